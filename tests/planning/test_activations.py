"""The formulas of docs/planning.md against what autograd keeps of a layer, to the byte."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import EncoderConfig, ExpertsConfig, ModelConfig
from megarl.models import sliced_attention
from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import attach
from megarl.models.attention import Context
from megarl.models.config import GPTConfig
from megarl.models.encoder_decoder import Spans, layer_of, spans
from megarl.models.exchange.adapters import new_spec
from megarl.models.layer import Layer
from megarl.models.rotary import rotation
from megarl.models.sliced_attention import SlicedMasks
from megarl.parallel.context import TimeSlices
from megarl.parallel.fake import fake_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import ModelInputs, Origins
from megarl.planning.activations import (
    Shape,
    kept_by_layer,
    kept_by_norm,
    kept_once_by_adapters,
    logits_chunk,
    not_kept_by_first,
    vocabulary,
)
from megarl.planning.parts import Positions

TIME, BATCH = 64, 2
AT = Positions(BATCH, TIME)


def layer_config(
    layout: Layout, precision: str, recompute: str, model: dict[str, Any], adapter: dict[str, Any] | None = None
) -> GPTConfig:
    shape = ModelConfig(
        **{"num_layers": 2, "hidden_size": 64, "num_heads": 8, "max_positions": 256, "ffn_size": 256, **model}
    )
    spec = None if adapter is None else new_spec(AdapterConfig(**adapter), shape, None)
    return GPTConfig.build(
        shape, layout, vocab_size=100, precision=precision, recompute=recompute, kernels="torch", adapter=spec
    )


def kept(
    layout: Layout,
    precision: str,
    recompute: str,
    model: dict[str, Any],
    adapter: dict[str, Any] | None = None,
    *,
    first: bool = False,
) -> int:
    """Bytes of all memory that a layer's forward pass keeps for its backward pass, weights and rotations excepted."""
    with fake_world(layout, layout.tp * (layout.cp - 1), device="cpu") as grid:  # its late slice begins inside
        config = layer_config(layout, precision, recompute, model, adapter)
        layer = Layer(config, 1, grid.groups)
        if config.adapter is not None:
            attach([layer], config.adapter, config, grid.groups.tp)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(ADAPTER in name)
        layer = layer.to(config.params_dtype).train()
        turn = None
        if config.position == "rope":
            positions = torch.arange(TIME).expand(BATCH, -1)
            turn = rotation(positions, config.rope, config.rotary_dim, config.params_dtype)
        shared = {
            tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers(), *(turn or ()))
        }
        split = layout.tp if layout.sequence_parallel else 1
        hidden = torch.randn(TIME // split, BATCH, 64, dtype=config.params_dtype, requires_grad=not first)
        rows = torch.arange(1, BATCH + 1)[:, None].expand(-1, TIME * layout.cp)
        sliced = SlicedMasks(TimeSlices(grid.groups.cp), [None, None]) if layout.cp > 1 else None
        context = Context(turn, None, origins=Origins(rows, float(BATCH * TIME), 1), sliced=sliced)
        return bytes_kept(lambda: layer(hidden, context), shared)


def bytes_kept(forward: Callable[[], object], shared: set[int]) -> int:
    """Bytes of all memory that a forward pass keeps for its backward pass, without storages at addresses `shared`."""
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    class Watched(sliced_attention._OwnPart):
        """Attention to keys of several ranks has hooks of its own, which hide tensors from those around them."""

        def pack(self, tensor: torch.Tensor) -> Any:
            packed = super().pack(tensor)
            keep(packed if isinstance(packed, torch.Tensor) else self.own)
            return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliced_attention, "_OwnPart", Watched)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
    return sum(found.values())


MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"activation": "gelu", "norm": "layernorm"},
    "gpt2": {"activation": "gelu", "norm": "layernorm", "position": "learned", "mlp_bias": True, "qkv_bias": True},
    "opt-grouped": {"activation": "relu", "norm": "layernorm", "position": "learned", "num_kv_heads": 2},
    "neox": {"activation": "gelu_tanh", "norm": "layernorm", "parallel_residual": "two_norms", "rope_percent": 0.25},
    "gptj": {"activation": "gelu_tanh", "norm": "layernorm", "parallel_residual": "one_norm", "rope_percent": 0.5},
    "llama": {"activation": "swiglu", "norm": "rmsnorm"},
    "llama-grouped": {"activation": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "head_dim": 16},
    "qwen3": {"activation": "swiglu", "norm": "rmsnorm", "num_kv_heads": 4, "qk_norm": True},
}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)],
    ids=str,
)
def test_a_layer_keeps_what_the_formula_says(
    layout: Layout, model: dict[str, Any], precision: str, recompute: str
) -> None:
    config = layer_config(layout, precision, recompute, model)
    shape = Shape.of(config, layout, 2 if precision == "bf16" else 4, on_cpu=True)
    expected = kept_by_layer(config, shape, AT, recompute)
    assert kept(layout, precision, recompute, model) == pytest.approx(expected, rel=0.01)


OF_SLICES: list[tuple[str, str, dict[str, Any] | None]] = [
    *((name, recompute, None) for name in MODELS for recompute in ("none", "selective")),
    *((name, "none", {"dropout": 0.1}) for name in ("gpt2", "gptj", "llama-grouped", "qwen3")),
    ("neox", "none", {"kind": "dora", "rank": 4}),
    ("llama", "none", {"targets": ["linear_fc1"]}),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "recompute", "adapter"), OF_SLICES)
@pytest.mark.parametrize(
    "layout", [Layout(cp=2), Layout(cp=4, tp=2), Layout(cp=2, tp=2, sequence_parallel=True)], ids=str
)
def test_a_layer_keeps_of_its_own_slices_what_the_formula_says(
    layout: Layout, model: str, precision: str, recompute: str, adapter: dict[str, Any] | None
) -> None:
    config = layer_config(layout, precision, recompute, MODELS[model], adapter)
    shape = Shape.of(config, layout, 2 if precision == "bf16" else 4, on_cpu=True)
    at = replace(AT, ranks=layout.cp)
    expected = kept_by_layer(config, shape, at, recompute) + kept_once_by_adapters(config, layout, shape, at)
    assert kept(layout, precision, recompute, MODELS[model], adapter) == pytest.approx(expected, rel=0.01)


EXPERTS = {"norm": "rmsnorm", "num_kv_heads": 4}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"activation": "swiglu", "experts": ExpertsConfig(count=8, chosen=2)},
    "qwen3-moe": {
        "activation": "swiglu",
        "qk_norm": True,
        "experts": ExpertsConfig(count=16, chosen=4, ffn_size=48, balance=0.1),
    },
    "qwen2-moe": {
        "activation": "swiglu",
        "experts": ExpertsConfig(count=6, chosen=3, ffn_size=64, shared_ffn_size=96, normalise=False),
    },
    "gelu": {"activation": "gelu", "experts": ExpertsConfig(count=6, chosen=2, shared_ffn_size=32)},
    "relu": {
        "activation": "relu",
        "norm": "layernorm",
        "experts": ExpertsConfig(count=6, chosen=1, normalise=False, z_loss=0.1),
    },
}


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["whole", "lora"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_a_layer_with_experts_keeps_what_the_formula_says(
    layout: Layout, model: str, precision: str, recompute: str, adapter: dict[str, Any] | None
) -> None:
    shape_of_model = {**EXPERTS, **MIXTURES[model]}
    config = layer_config(layout, precision, recompute, shape_of_model, adapter)
    shape = Shape.of(config, layout, 2 if precision == "bf16" else 4, on_cpu=True)
    at = Positions(BATCH, TIME, routed=True)
    expected = kept_by_layer(config, shape, at, recompute) + kept_once_by_adapters(config, layout, shape, at)
    assert kept(layout, precision, recompute, shape_of_model, adapter) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"kind": "dora", "rank": 4},
        {"dropout": 0.1},
        {"base_bits": 4},
        {"targets": ["linear_qkv"], "kind": "dora"},
        {"targets": ["linear_proj", "linear_fc2"]},
        {"targets": ["linear_fc1"]},
    ],
    ids=["lora", "dora", "dropout", "4-bits", "qkv", "rows", "fc1"],
)
@pytest.mark.parametrize(
    "model",
    [
        {"activation": "gelu", "norm": "layernorm", "position": "learned", "mlp_bias": True, "qkv_bias": True},
        {"activation": "gelu_tanh", "norm": "layernorm", "parallel_residual": "two_norms", "rope_percent": 0.25},
        {"activation": "gelu_tanh", "norm": "layernorm", "parallel_residual": "one_norm", "rope_percent": 0.5},
        {"activation": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "head_dim": 16},
        {"activation": "swiglu", "norm": "rmsnorm", "num_kv_heads": 4, "qk_norm": True},
    ],
    ids=["gpt2", "neox", "gptj", "llama-grouped", "qwen3"],
)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_a_layer_with_adapters_keeps_what_the_formula_says(
    layout: Layout, model: dict[str, Any], adapter: dict[str, Any], precision: str
) -> None:
    config = layer_config(layout, precision, "none", model, adapter)
    shape = Shape.of(config, layout, 2 if precision == "bf16" else 4, on_cpu=True)
    once = kept_once_by_adapters(config, layout, shape, AT)
    for first in (False, True) if not {"targets", "dropout"} & adapter.keys() else (False,):
        left_out = not_kept_by_first(config, shape, AT) if first else 0.0
        expected = kept_by_layer(config, shape, AT, "none") - left_out + once
        assert kept(layout, precision, "none", model, adapter, first=first) == pytest.approx(expected, rel=0.01)


def test_the_formula_by_hand_for_a_llama_on_a_gpu() -> None:
    # TP2 with sequence parallelism, bf16; hidden 64, 8 heads of 8, 2 key-value heads, MLP 256. Per token, in elements:
    # norms: twice (input 32 + output 32) = 128, and twice 4 bytes / 2 of statistics
    # attention: projection (64 + 2 * 16) / 2 = 48, rotated queries 32 and keys 8, output 32 = 120; 4 heads * 4 bytes
    # MLP: five times 256 / 2 = 640
    layout = Layout(tp=2, sequence_parallel=True)
    config = layer_config(layout, "bf16", "none", {"activation": "swiglu", "num_kv_heads": 2})
    shape = Shape.of(config, layout, 2, on_cpu=False)
    assert kept_by_layer(config, shape, Positions(1, 1), "none") == 2 * (128 + 120 + 640) + 2 * 2 + 4 * 4
    assert kept_by_layer(config, shape, Positions(1, 1), "full") == 2 * 32
    assert kept_by_layer(config, shape, Positions(3, 5), "none") == 15 * kept_by_layer(
        config, shape, Positions(1, 1), "none"
    )


ENCODED, DECODED = 96, 80
T5 = {"position": "relative", "activation": "geglu", "head_dim": 16, "encoder": EncoderConfig(num_layers=2, start_id=0)}
PLACES = {
    "encoder": (1, Positions(BATCH, ENCODED, DECODED)),
    "the encoder's last": (2, Positions(BATCH, ENCODED, DECODED)),
    "decoder": (3, Positions(BATCH, DECODED, ENCODED, crosses=True)),
}
"""Number of a layer, and its positions."""


def kept_by_part(
    layout: Layout,
    precision: str,
    recompute: str,
    model: dict[str, Any],
    part: str,
    adapter: dict[str, Any] | None = None,
    *,
    first: bool = False,
) -> int:
    """Bytes that a layer of an encoder-decoder keeps, without what all layers share: masks and buckets of distances."""
    number, _ = PLACES[part]
    with fake_world(layout, device="cpu") as grid:
        config = layer_config(layout, precision, recompute, model, adapter)
        layer = layer_of(config, number)(config, number, grid.groups)
        if config.adapter is not None:
            attach([layer], config.adapter, config, grid.groups.tp)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(ADAPTER in name)
        layer = layer.to(config.params_dtype).train()
        table = torch.zeros(32, 8 // layout.tp, dtype=config.params_dtype, requires_grad=config.adapter is None)
        inputs = spans(inputs_of(ENCODED, DECODED), config, (table, table), None)
        kept = (table, *layer.parameters(), *layer.buffers(), *tensors_of(inputs))
        shared = {tensor.untyped_storage().data_ptr() for tensor in kept}
        time = (ENCODED + DECODED) // (layout.tp if layout.sequence_parallel else 1)
        hidden = torch.randn(time, BATCH, 64, dtype=config.params_dtype, requires_grad=not first)
        return bytes_kept(lambda: layer(hidden, inputs), shared)


def inputs_of(encoded: int, decoded: int) -> ModelInputs:
    def inputs(time: int, **more: Any) -> ModelInputs:
        index = torch.arange(time).expand(BATCH, -1)
        return ModelInputs(tokens=torch.zeros_like(index), positions=index, **more)

    return inputs(decoded, encoder=inputs(encoded, segment_ids=torch.ones(BATCH, encoded, dtype=torch.long)))


def tensors_of(inputs: Spans) -> list[torch.Tensor]:
    found = [inputs.cross, inputs.encoder.mask, inputs.decoder.mask]
    for part in (inputs.encoder, inputs.decoder):
        if part.relative is not None:
            found += [part.relative.buckets, part.relative.values, part.relative.added]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("part", PLACES)
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model", [T5, {**T5, "activation": "relu", "norm": "layernorm"}], ids=["t5-1.1", "t5-1.0-layernorm"]
)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_a_layer_of_an_encoder_decoder_keeps_what_the_formula_says(
    layout: Layout, model: dict[str, Any], precision: str, recompute: str, part: str
) -> None:
    config = layer_config(layout, precision, recompute, model)
    shape = Shape.of(config, layout, 2 if precision == "bf16" else 4, on_cpu=True)
    number, at = PLACES[part]
    expected = kept_by_layer(config, shape, at, recompute)
    if number == config.encoder_layers:
        expected += at.tokens * kept_by_norm(config, shape, outputs=False)
    assert kept_by_part(layout, precision, recompute, model, part) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"kind": "dora", "rank": 4},
        {"dropout": 0.1},
        {"base_bits": 4},
        {"targets": ["linear_qkv", "cross_attention.linear_kv"], "kind": "dora"},
        {"targets": ["linear_fc1", "cross_attention.linear_q"], "dropout": 0.1},
        {"targets": ["linear_fc2", "cross_attention.linear_proj"]},
    ],
    ids=["lora", "dora", "dropout", "4-bits", "inputs", "queries", "rows"],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_a_layer_of_an_encoder_decoder_with_adapters_keeps_what_the_formula_says(
    layout: Layout, part: str, adapter: dict[str, Any], precision: str
) -> None:
    config = layer_config(layout, precision, "none", T5, adapter)
    shape = Shape.of(config, layout, 2 if precision == "bf16" else 4, on_cpu=True)
    _, at = PLACES[part]
    once = kept_once_by_adapters(config, layout, shape, at)
    for first in (False, True) if part == "encoder" and not {"targets", "dropout"} & adapter.keys() else (False,):
        left_out = not_kept_by_first(config, shape, at) if first else 0.0
        expected = kept_by_layer(config, shape, at, "none") - left_out + once
        measured = kept_by_part(layout, precision, "none", T5, part, adapter, first=first)
        assert measured == pytest.approx(expected, rel=0.01)


def test_logits_are_cut_evenly_below_their_budget() -> None:
    # 2^26 elements are the budget on a GPU: 5000 rows of 32768 columns are three parts, of 1667 rows
    assert logits_chunk(5000, 32768, on_cpu=False) == 1667 * 32768
    assert logits_chunk(10, 32768, on_cpu=False) == 10 * 32768


def test_the_output_layer_never_holds_a_batchs_logits() -> None:
    layout = Layout()
    config = layer_config(layout, "bf16", "none", {})
    shape = Shape.of(config, layout, 2, on_cpu=False)
    config.vocab_size = 128256
    held = vocabulary(config, shape, layout, 65536, backward=True, entropy=False, width=64)
    assert held < 65536 * 128256 * 2 / 20
