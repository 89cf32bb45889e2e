"""What a mixture of experts cannot do, and what only it can. The rules of a configuration say so before anything is
built, and engines where they are made without one."""

from __future__ import annotations

from megarl.errors import ConfigError


def refuse_quantised(base_bits: int) -> None:
    """Refuse adapters of a mixture beside a base in fewer bits."""
    if base_bits < 16:
        raise ConfigError(
            f"adapter.base_bits={base_bits}: the experts of a mixture are not quantised: use adapter.base_bits=16",
            key="adapter.base_bits",
            value=base_bits,
            offers={"adapter.base_bits": [16]},
        )


def refuse_moved(layout: object, ep: int) -> None:
    """Refuse another layout for generation, `rollout.engine.layout`, of experts that replicas share."""
    if ep > 1:
        raise ConfigError(
            f"rollout.engine.layout={layout} with parallel.ep={ep}: experts that replicas share are not moved to "
            "another layout: use rollout.engine.layout=null",
            key="rollout.engine.layout",
            value=layout,
            offers={"rollout.engine.layout": [None]},
        )


def refuse_graphs_and_routes(*, has_experts: bool, graphs: bool, routes: bool) -> None:
    """Refuse CUDA graphs of a mixture, and routes of any other model."""
    if graphs and has_experts:
        raise _switched_on(
            "rollout.engine.cuda_graphs", "each pass of a mixture of experts has other numbers of tokens per expert"
        )
    if routes and not has_experts:
        raise _switched_on("rollout.engine.router_replay", "the model has no experts to record")


def _switched_on(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}=true: {problem}: use {key}=false", key=key, value=True, offers={key: [False]})
