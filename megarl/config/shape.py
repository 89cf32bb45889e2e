"""Rules for a model's architecture, alone and with the parallel layout that splits it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megarl.config.offers import Refusal, divisors, enforce, multiples, require_divides
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.values import check_types, check_values
from megarl.errors import ConfigError

_UNSPLIT = SimpleNamespace(tp=1, pp=1, cp=1, ep=1, vpp=None)


def check_shape(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse an architecture that contradicts itself or that the layout cannot split.

    `check` skips models with `model.path`, whose architecture is in a file: call this once it is known.
    """
    enforce([shape_rule], SimpleNamespace(model=model, parallel=parallel), parallel.tp * parallel.pp * parallel.cp)


def shape_rule(config: Any, world_size: int) -> None:
    """Refuse an architecture that contradicts itself or that the layout cannot split."""
    model, parallel = config.model, config.parallel
    model.check_shape()
    _width(model, parallel)
    _depth(model, parallel)
    if parallel.cp > 1 and model.encoder is not None:
        raise Refusal(
            f"parallel.cp={parallel.cp}: the sequences of an encoder-decoder are not split over processes",
            {"parallel.cp": [1]},
            "parallel.tp with parallel.sequence_parallel=true for long sequences",
            key="parallel.cp",
            value=parallel.cp,
        )


def shape_problem(model: ModelConfig, parallel: ParallelConfig | None = None) -> ConfigError | None:
    """Return the first error in the values of a model that came from a file, or with the layout that splits it; or
    None."""
    try:
        check_types(model, "model.")
        check_values(model, "model.")
        shape_rule(SimpleNamespace(model=model, parallel=parallel or _UNSPLIT), 1)
    except ConfigError as problem:
        return problem
    return None


def _width(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check the sizes that tensor parallelism splits."""
    tp, kv_heads = parallel.tp, model.kv_heads
    require_divides("parallel.tp", "model.num_heads", tp, model.num_heads)
    if kv_heads % tp and tp % kv_heads:
        raise Refusal(
            f"parallel.tp={tp} neither divides model.num_kv_heads={kv_heads} nor is a multiple of it",
            {"parallel.tp": divisors(model.num_heads), "model.num_kv_heads": divisors(model.num_heads)},
            key="parallel.tp",
            value=tp,
        )
    require_divides("parallel.tp", "model.hidden_size", tp, model.hidden_size)
    if model.experts is None or model.experts.dense_layers:  # else no layer is as wide
        require_divides("parallel.tp", "model.ffn_size", tp, model.ffn_width)
    _experts(model, parallel)


def _experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check the sizes of experts that are split, and that there are experts to share."""
    if model.experts is None:
        if parallel.ep > 1:
            raise Refusal(
                f"parallel.ep={parallel.ep}: the model has no experts to share",
                {"parallel.ep": [1]},
                "a model with model.experts.count",
                key="parallel.ep",
                value=parallel.ep,
            )
        return
    require_divides("parallel.ep", "model.experts.count", parallel.ep, model.experts.count or 0)
    require_divides("parallel.tp", "model.experts.ffn_size", parallel.tp, model.expert_width)
    if model.experts.shared_ffn_size is not None:
        key = "model.experts.shared_ffn_size"
        require_divides("parallel.tp", key, parallel.tp, model.experts.shared_ffn_size)


def possible_stages(encoder_layers: int, num_layers: int) -> list[int]:
    """Return the numbers of pipeline stages into which a model can be cut: the divisors of its layers.

    An encoder-decoder has one stage, or two if its parts are equal: all layers of a part use one table of relative
    positions, which one stage holds.

    Args:
        encoder_layers: layers of the encoder; 0 without one.
        num_layers: the other layers.
    """
    if encoder_layers == 0:
        return divisors(num_layers)
    return [1, 2] if encoder_layers == num_layers else [1]


def _depth(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check the layers that pipeline parallelism splits into stages."""
    layers, pp, vpp = model.layers, parallel.pp, parallel.vpp
    if model.encoder is not None and pp > 1:
        _depth_of_encoder_decoder(model, parallel)
        return
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


def _depth_of_encoder_decoder(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that the encoder is one stage and the decoder the other."""
    stages = possible_stages(model.encoder_layers, model.num_layers)
    if parallel.pp in stages and parallel.vpp is None:
        return
    raise Refusal(
        f"parallel.pp={parallel.pp}"
        + (f" with parallel.vpp={parallel.vpp}" if parallel.vpp is not None else "")
        + f" does not put the encoder's {model.encoder_layers} layers on one stage and the {model.num_layers} of the "
        "decoder on another",
        {"parallel.pp": stages, **({"parallel.vpp": [None]} if parallel.vpp is not None else {})},
        key="parallel.pp",
        value=parallel.pp,
    )
