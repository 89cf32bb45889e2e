"""Rules of a model's shape, alone and against the layout that splits it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megarl.config.offers import Refusal, divisors, enforce, multiples, require_divides
from megarl.config.values import check_declared, check_types
from megarl.errors import ConfigError

if TYPE_CHECKING:
    from megarl.config.schema import ModelConfig, ParallelConfig

MOST_PARAMETERS = 10**13
_UNSPLIT = SimpleNamespace(tp=1, pp=1, vpp=None)


def check_shape(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a shape that contradicts itself or does not divide over the layout.

    `check` leaves out models with `model.path`, whose shape is in the file: call this once it is known.
    """
    enforce([shape_rule], SimpleNamespace(model=model, parallel=parallel), parallel.tp * parallel.pp * parallel.cp)


def shape_rule(config: Any, world_size: int) -> None:
    """Refuse a shape that contradicts itself or does not divide over the layout."""
    model, parallel = config.model, config.parallel
    if model.head_dim is None:
        require_divides("model.num_heads", "model.hidden_size", model.num_heads, model.hidden_size)
    if model.num_kv_heads is not None:
        require_divides("model.num_kv_heads", "model.num_heads", model.num_kv_heads, model.num_heads)
    _rope(model, model.head_dim or model.hidden_size // model.num_heads)
    if model.num_layers_unfrozen > model.num_layers:
        raise Refusal(
            f"model.num_layers_unfrozen={model.num_layers_unfrozen} is more than model.num_layers={model.num_layers}",
            {"model.num_layers_unfrozen": [model.num_layers]},
            "-1 to train everything",
            key="model.num_layers_unfrozen",
            value=model.num_layers_unfrozen,
        )
    _width(model, parallel)
    _depth(model, parallel)
    _size(model)


def _size(model: ModelConfig) -> None:
    """Refuse a model that is too large to be intended."""
    width, ffn = model.hidden_size, model.ffn_size or 4 * model.hidden_size
    heads = model.num_heads * (model.head_dim or width // model.num_heads)
    rows = (model.vocab_size or 0) + (model.max_positions if model.position == "learned" else 0)
    parameters = width * (model.num_layers * (2 * heads + 2 * ffn) + rows)
    if parameters > MOST_PARAMETERS:
        raise Refusal(
            f"model.hidden_size={width}, model.num_layers={model.num_layers} and the other sizes come to "
            f"{parameters:.0e} parameters, and megarl builds no model of more than {MOST_PARAMETERS:.0e}: use smaller "
            "ones",
            key="model.hidden_size",
            value=width,
        )


def shape_problem(model: ModelConfig) -> ConfigError | None:
    """Return the first error in the values of a model that came from a file, or None."""
    try:
        check_types(model, "model.")
        check_declared(model, "model.")
        shape_rule(SimpleNamespace(model=model, parallel=_UNSPLIT), 1)
    except ConfigError as problem:
        return problem
    return None


def _rope(model: ModelConfig, head_dim: int) -> None:
    """Rotary embeddings need an even width and, stretched, the length they were trained at."""
    if model.position != "rope":
        if model.rope_scaling != "none":
            raise Refusal(
                f"model.rope_scaling={model.rope_scaling} needs rotary positions, not model.position={model.position}",
                {"model.position": ["rope"], "model.rope_scaling": ["none"]},
                key="model.rope_scaling",
                value=model.rope_scaling,
            )
        return
    rotated = int(head_dim * model.rope_percent)
    if rotated < 2 or rotated % 2:
        raise Refusal(
            f"model.rope_percent={model.rope_percent:g} of a head {head_dim} wide rotates {rotated} "
            "dimensions, which must be an even number",
            {"model.rope_percent": [even / head_dim for even in multiples(2, rotated) if even <= head_dim]},
            "an even model.head_dim",
            key="model.rope_percent",
            value=model.rope_percent,
        )
    if model.rope_scaling in ("llama3", "yarn") and model.rope_original_positions is None:
        raise Refusal(
            f"model.rope_scaling={model.rope_scaling} needs model.rope_original_positions, the context "
            "length before stretching: set it, for example to 8192",
            key="model.rope_original_positions",
        )
    if model.rope_scaling == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise Refusal(
            f"model.rope_low_freq_factor={model.rope_low_freq_factor:g} is not below "
            f"model.rope_high_freq_factor={model.rope_high_freq_factor:g}",
            {"model.rope_low_freq_factor": [1], "model.rope_high_freq_factor": [4]},
            "another pair, the low one smaller",
            key="model.rope_low_freq_factor",
            value=model.rope_low_freq_factor,
        )


def _width(model: ModelConfig, parallel: ParallelConfig) -> None:
    """What tensor parallelism cuts into pieces."""
    tp, kv_heads = parallel.tp, model.num_kv_heads or model.num_heads
    require_divides("parallel.tp", "model.num_heads", tp, model.num_heads)
    if kv_heads % tp and tp % kv_heads:
        raise Refusal(
            f"parallel.tp={tp} neither divides model.num_kv_heads={kv_heads} nor is a multiple of it",
            {"parallel.tp": divisors(model.num_heads), "model.num_kv_heads": divisors(model.num_heads)},
            key="parallel.tp",
            value=tp,
        )
    require_divides("parallel.tp", "model.hidden_size", tp, model.hidden_size)
    require_divides("parallel.tp", "model.ffn_size", tp, model.ffn_size or 4 * model.hidden_size)


def _depth(model: ModelConfig, parallel: ParallelConfig) -> None:
    """What pipeline parallelism cuts into stages."""
    layers, pp, vpp = model.num_layers, parallel.pp, parallel.vpp
    if vpp is None:
        require_divides("parallel.pp", "model.num_layers", pp, layers)
        return
    if pp == 1:
        raise Refusal(
            f"parallel.vpp={vpp} needs a pipeline, but parallel.pp=1",
            {"parallel.pp": divisors(layers)[1:], "parallel.vpp": [None]},
            key="parallel.vpp",
            value=vpp,
        )
    if layers % (pp * vpp):
        raise Refusal(
            f"parallel.pp={pp} * parallel.vpp={vpp} = {pp * vpp} stages do not divide model.num_layers={layers}",
            {
                "parallel.vpp": [n for n in divisors(layers) if n > 1] + [None],
                "model.num_layers": multiples(pp * vpp, layers),
            },
            key="parallel.vpp",
            value=vpp,
        )
