"""A GPT in a separate parallel layout for generation (`rollout.engine.layout`)."""

import copy

from megarl.config.mixtures import refuse_moved
from megarl.config.offers import either
from megarl.config.shape import possible_stages
from megarl.config.world import layout_sizes
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.models.build import empty_model
from megarl.models.config import GPTConfig
from megarl.parallel.engine import BuildModel, Engine
from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.parallel.reshard import Reshard

log = get_logger(__name__)


def for_generation(engine: Engine, layout: str | None) -> Reshard | None:
    """Return the engine in another layout, for a `Generator`; None if `layout` is null or the engine's own. All ranks
    call this.

    The amounts of data to move are logged before anything moves. Call `refresh()` before generating.
    """
    wanted = other_layout(layout, engine.grid.layout)
    if wanted is None:
        return None
    refuse_moved(layout, engine.grid.layout.ep)
    check_divides(engine.config, wanted, str(layout))
    heads = engine.models[0].heads

    def build_on(grid: Grid) -> BuildModel:
        return empty_model(_config_for(engine.config, grid.layout), grid, heads)

    reshard = Reshard(engine, wanted, build_on)
    if engine.grid.rank == 0:
        log.info("%s", reshard.table())
    return reshard


def other_layout(text: str | None, present: Layout) -> Layout | None:
    """Return the layout that `rollout.engine.layout` names; None if it is null or the present one."""
    wanted = None if text is None else parse_layout(text, present.world_size)
    return None if wanted is None or (wanted.tp, wanted.pp) == (present.tp, present.pp) else wanted


def parse_layout(text: str, world: int) -> Layout:
    """Parse `tp4`, `pp2` or `tp2xpp2`. The number of replicas is as many as fill the world."""
    tp, pp = layout_sizes(text)
    layout = Layout(tp=tp, pp=pp)
    if world % layout.replica_size:
        raise ConfigError(
            f"rollout.engine.layout={text} takes {layout.replica_size} processes for one model, which do not divide "
            f"the {world} processes of the run: use a layout whose sizes do",
            key="rollout.engine.layout",
            value=text,
        )
    return Layout(tp=layout.tp, pp=layout.pp, dp=world // layout.replica_size)


def check_divides(config: GPTConfig, layout: Layout, text: str) -> None:
    """Refuse a layout whose sizes do not divide the model's dimensions, as for `parallel.tp` and `parallel.pp`."""
    widths = {"attention heads": config.num_attention_heads, "channels": config.hidden_size}
    if config.expert_layers < config.num_layers:
        widths["channels of the MLP"] = config.ffn_hidden_size
    if config.experts is not None:
        widths["channels of an expert"] = config.expert_width
        widths["channels of the shared expert"] = config.experts.shared_ffn_size or 0
    for what, count in widths.items():
        if count % layout.tp:
            raise ConfigError(
                f"rollout.engine.layout={text} splits {count} {what} {layout.tp} ways: use a tp that divides them",
                key="rollout.engine.layout",
                value=text,
            )
    _check_stages(config, layout, text)
    if config.num_kv_heads % layout.tp and layout.tp % config.num_kv_heads:
        raise ConfigError(
            f"rollout.engine.layout={text}: of {config.num_kv_heads} key-value heads and tp={layout.tp}, "
            "neither divides the other",
            key="rollout.engine.layout",
            value=text,
        )


def _check_stages(config: GPTConfig, layout: Layout, text: str) -> None:
    encoder, decoder = config.encoder_layers, config.num_layers - config.encoder_layers
    stages = possible_stages(encoder, decoder)
    if layout.pp not in stages:
        layers = f"{encoder} + {decoder}" if encoder else f"{decoder}"
        raise ConfigError(
            f"rollout.engine.layout={text} splits {layers} layers {layout.pp} ways: use a pp of {either(stages)}",
            key="rollout.engine.layout",
            value=text,
        )


def _config_for(config: GPTConfig, layout: Layout) -> GPTConfig:
    """Return the model's configuration for another layout, without settings that only training needs."""
    changed = copy.copy(config)  # not constructed again, which would derive its derived values a second time
    changed.tensor_model_parallel_size = layout.tp
    changed.pipeline_model_parallel_size = layout.pp
    changed.sequence_parallel = False
    changed.recompute_granularity = None
    return changed
