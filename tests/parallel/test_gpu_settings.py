"""A GPU's settings, tried on a CPU: the same numbers as with a CPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megarl.errors import CheckpointError, ConfigError
from megarl.models import attention
from megarl.models.attention import attention_mask
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel import device, products
from megarl.parallel.device import CPU, GPU, VARIABLE, DeviceSettings, assumed, device_settings
from megarl.parallel.engine import _load_weights
from megarl.rollout import static
from tests.gated import gated
from tests.parallel.engines import batches, small_engine
from tests.refusals import refused
from tests.worlds import Worlds

STEPS = (2, 4, 2)  # microbatches of each replica: packing gives every step its own number
GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu", "tie_embeddings": True, "mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": GPT2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"dp": 2}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2sp": (2, {"tp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
    "tp2pp2sp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "pp2dp2": (4, {"pp": 2, "dp": 2}),
}


def trained(
    layout: dict[str, Any], model: dict[str, Any], **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of steps with several numbers of microbatches, and this rank's weights after them."""
    engine = small_engine({key: value for key, value in layout.items() if key != "dp"}, model, **options)
    course = []
    for step, count in enumerate(STEPS):
        rows = batches(engine, step, rows=2 * count * engine.grid.layout.dp)
        course.append(engine.train_step(rows, cross_entropy, count_targets)["loss"])
        course.append(engine.apply_gradients())
    return course, {name: weight.detach().clone() for name, weight in engine.parameters()}


def with_settings(settings: DeviceSettings, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Work with some settings. Products are MKL's, as a CPU's layers would use oneDNN on some processors, which rounds
    otherwise than torch's layers."""
    with assumed(settings), pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_is_faster", lambda: False)
        return work(*args, **options)


CASES = [(layout, model) for layout in LAYOUTS for model in MODELS]
LATER = [("dp2", "llama"), ("pp2vpp2", "llama"), ("pp2", "llama"), ("pp2", "gpt2"), ("tp2sp", "gpt2")]
LATER += [("tp2pp2sp", "gpt2"), ("pp2dp2", "llama"), ("pp2dp2", "gpt2"), ("cp2", "gpt2")]


@pytest.mark.parametrize(("layout", "model"), gated(CASES, LATER))
def test_training_is_the_same_with_a_gpus_settings(layout: str, model: str, worlds: Worlds) -> None:
    """Attention by other kernels rounds otherwise, and Adam shows that where a gradient is nearly 0: with it, losses
    and norms are compared; without it, weights too."""
    world, grid = LAYOUTS[layout]
    plain = worlds.run(world, with_settings, CPU, trained, grid, MODELS[model])
    same_attention = replace(GPU, plain_attention=True)
    for settings in (GPU, same_attention):
        gpus = worlds.run(world, with_settings, settings, trained, grid, MODELS[model])
        for (course, weights), (wanted, expected) in zip(gpus, plain, strict=True):
            same = settings is same_attention
            assert course == pytest.approx(wanted, rel=1e-6 if same else 1e-5, abs=1e-7)
            for name, weight in weights.items() if same else ():
                assert torch.allclose(weight, expected[name], rtol=1e-6, atol=1e-6), name


def in_the_last_layers(name: str) -> bool:
    return not name.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1."))


@pytest.mark.parametrize("offset", [0, 2], ids=["gpt2", "opt"])
@pytest.mark.parametrize("layout", ["dp2", "pp2vpp2"])
def test_a_frozen_model_with_learned_positions_trains_the_same(layout: str, offset: int, worlds: Worlds) -> None:
    model = {**GPT2, "position_offset": offset, "tie_embeddings": False}
    world, grid = LAYOUTS[layout]
    options = {"trainable": in_the_last_layers}
    plain = worlds.run(world, with_settings, CPU, trained, grid, model, **options)
    settings = replace(GPU, plain_attention=True)
    for (course, weights), (wanted, expected) in zip(
        worlds.run(world, with_settings, settings, trained, grid, model, **options), plain, strict=True
    ):
        assert course == pytest.approx(wanted, rel=1e-6, abs=1e-7)
        for name, weight in weights.items():
            assert torch.allclose(weight, expected[name], rtol=1e-6, atol=1e-6), name


def swapped() -> tuple[list[int], list[int], bool]:
    """Where a reference is swapped in twice: the memory used each time, and whether the weights came back."""
    engine = small_engine({})
    reference = engine.trainable_copy()
    engine.train_step(batches(engine, 0), cross_entropy, count_targets)
    engine.apply_gradients()
    present = {name: weight.clone() for name, weight in engine.parameters()}
    used = []
    for _ in range(2):
        with engine.with_weights(reference):
            assert all(torch.equal(weight, reference[name]) for name, weight in engine.parameters())
        used.append([memory.data_ptr() for memory in (engine.aside or {}).values()])
    return *used, all(torch.equal(present[name], weight) for name, weight in engine.parameters())  # type: ignore[return-value]


def test_weights_that_are_swapped_out_use_the_same_memory_each_time(worlds: Worlds) -> None:
    ((first, second, same),) = worlds.run(1, with_settings, GPU, swapped)
    assert same
    assert first
    assert first == second


def masks_of(time: int, dtype: torch.dtype) -> torch.Tensor:
    segments = torch.tensor([[1] * 5 + [2] * (time - 7) + [0] * 2])
    mask = attention_mask(segments, time, None, torch.device("cpu"), dtype)
    assert mask is not None
    return mask


@pytest.mark.parametrize("time", [13, 64, 100])
def test_a_packed_mask_is_one_number_per_pair_in_the_models_dtype(time: int) -> None:
    with assumed(GPU):
        mask = masks_of(time, torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert mask.stride(-2) % 8 == 0
    with assumed(CPU):
        plain = masks_of(time, torch.bfloat16)
    allowed = plain if plain.dtype == torch.bool else plain == 0
    assert torch.equal(mask == 0, allowed)
    assert bool((mask[~allowed] == -torch.inf).all())


def test_decoding_reads_grouped_heads_and_masks_without_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels would copy the cache for every head, or plan anew for each length."""
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("a fused kernel"))
    layer = SimpleNamespace(config=SimpleNamespace(attention_dropout=0.0), training=False, scale=8**-0.5)
    query, keys = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 20, 8)
    with assumed(GPU):
        mixed = attention.SelfAttention._attend(layer, query, keys, keys, torch.zeros(3, 1, 1, 20), None, None)  # type: ignore[arg-type]
    assert mixed.shape == (1, 3, 32)


def test_the_kernel_that_attention_gets_is_said_once_for_each_kind_of_input(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_logged", set())
    layer = SimpleNamespace(config=SimpleNamespace(attention_dropout=0.0), training=False, scale=8**-0.5)
    query, keys, mask = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.zeros(2, 1, 9, 9)
    caplog.set_level("INFO", logger="megarl")
    for settings in (GPU, GPU, CPU):
        with assumed(settings):
            attention.SelfAttention._attend(layer, query, keys, keys, mask, None, None)  # type: ignore[arg-type]
            attention.SelfAttention._attend(layer, query, keys, keys, None, None, None)  # type: ignore[arg-type]
    chosen = [SDPBackend(torch._fused_sdp_choice(query, *[query] * 2, mask)).name.lower()]
    chosen += [SDPBackend(torch._fused_sdp_choice(query, *[keys] * 2, is_causal=True, enable_gqa=True)).name.lower()]
    assert caplog.messages == [
        f"attention in float32 with a mask: torch's kernel {chosen[0]}",
        f"attention in float32 with grouped heads: torch's kernel {chosen[1]}",
    ]


def test_a_kernel_that_keeps_all_scores_of_long_rows_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_logged", set())
    monkeypatch.setattr(attention, "LARGE_SCORES", 2 * 4 * 9 * 9 * 4 - 1)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.MATH.value)
    query = torch.randn(2, 4, 9, 8)
    attention.log_kernel(query, query, query, None, 0.0, True, False)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "rows of 9 tokens" in warning
    assert "data.pack=false, ppo.pack=false" in warning


def test_recorded_passes_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "one pool")
    monkeypatch.setattr(static.StaticPass, "run", lambda self, *_: pools.append(self.pool))
    cache = SimpleNamespace(store=SimpleNamespace(device=torch.device("cuda")), slots=8, length=256, longest_encoded=0)
    monkeypatch.setattr(static.StaticPass, "__init__", lambda self, *args: setattr(self, "pool", args[-1]))
    passes = static.StaticPasses(model=None, token_scorer=None, cache=cache)  # type: ignore[arg-type]
    for rows, length in ((1, 10), (4, 100), (8, 200)):
        passes.scores(torch.zeros(rows), torch.zeros(rows), length)
    assert pools == ["one pool"] * 3


class WithExtraState(torch.nn.Linear):
    """As Transformer Engine's layers are, whose extra state is empty without FP8 and not in checkpoints."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(0)

    def set_extra_state(self, state: torch.Tensor) -> None:
        pytest.fail("there is none to set")

    def not_stored(self) -> set[str]:
        return set()


def test_weights_load_into_layers_that_have_extra_state() -> None:
    source, layer = torch.nn.Linear(3, 2), WithExtraState(3, 2)
    _load_weights(layer, source.state_dict())
    assert torch.equal(layer.weight, source.weight)
    with refused(CheckpointError, key="bias"):
        _load_weights(layer, {"weight": source.weight.detach()})


def test_the_variable_switches_them_on_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    device._of_this_machine.cache_clear()
    assert device_settings() == CPU
    for value, wanted in (("1", GPU), ("0", CPU), ("", CPU)):
        monkeypatch.setenv(VARIABLE, value)
        device._of_this_machine.cache_clear()
        assert device_settings() == wanted
    monkeypatch.setenv(VARIABLE, "yes")
    device._of_this_machine.cache_clear()
    with refused(ConfigError, key=VARIABLE, value="yes", offers={VARIABLE: ["1", "0"]}):
        device_settings()
