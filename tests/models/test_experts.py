"""A mixture of experts trains alike in every layout; its router's losses do not depend on how a batch is cut, and
padding goes to no expert."""

from typing import Any

import pytest
import torch

from megarl.config.sections.model import ExpertsConfig
from megarl.models.attention import Context
from megarl.models.build import GPTConfig
from megarl.models.experts import ExpertLayer, RouterStats, expert_layers
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Origins, Rows
from tests.gated import gated
from tests.parallel.engines import VOCAB, small_engine
from tests.worlds import Worlds

EXPERTS: dict[str, Any] = {
    "hidden_size": 32,
    "experts": ExpertsConfig(
        count=4, chosen=2, ffn_size=24, shared_ffn_size=40, dense_layers=[1], balance=0.1, z_loss=0.01
    ),
}
STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "EP2": (2, {"ep": 2}),
    "TP2": (2, {"tp": 2}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
    "PP2 with virtual stages": (2, {"pp": 2, "vpp": 2}),
    "TP2xEP2+SP": (4, {"tp": 2, "ep": 2, "sequence_parallel": True}),
    "TP2xEP2": (4, {"tp": 2, "ep": 2}),
    "PP2xEP2": (4, {"pp": 2, "ep": 2}),
    "EP2xDP2": (4, {"ep": 2}),
    "EP4": (4, {"ep": 4}),
}


def ragged_rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 30, (16,), generator=generator)
    inside = torch.arange(32) < lengths[:, None]
    tokens = torch.randint(1, VOCAB, (16, 32), generator=generator) * inside
    return Rows(tokens, lengths, inside.float())


def learned(
    layout: dict[str, Any], *, share_bins: bool = True, micro: int = 2, **options: Any
) -> list[dict[str, float]]:
    """The statistics of each step, with the norm of the gradient and the number of tensors that should have one and
    have none."""
    engine = small_engine(layout, EXPERTS, **options)
    engine.observer = RouterStats(engine.models, engine.config, engine.grid)
    history = []
    for _ in range(STEPS):
        batch = make_microbatches(ragged_rows(), torch.arange(16), engine, per_microbatch=micro, share_bins=share_bins)
        stats = engine.train_step(batch, cross_entropy, count_targets)
        reached, wanted = engine.gradient_names()
        history.append(
            {**stats, **engine.observed, "norm": engine.apply_gradients(), "unreached": len(wanted - reached)}
        )
    return history


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> list[dict[str, float]]:
    (history,) = worlds.run(1, learned, {})
    assert history[0]["loss"] != history[-1]["loss"]
    return history  # type: ignore[no-any-return]


def check_same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            assert one[name] == pytest.approx(value, rel=1e-4 if name == "norm" else 1e-5), name


@pytest.mark.parametrize(
    "name", gated(LAYOUTS, ["DP2", "TP2", "TP2+SP", "PP2", "TP2xEP2", "PP2xEP2", "EP2xDP2", "EP4"])
)
def test_a_layout_has_the_losses_and_gradients_of_one_process(
    name: str, worlds: Worlds, alone: list[dict[str, float]]
) -> None:
    size, layout = LAYOUTS[name]
    for history in worlds.run(size, learned, layout):
        check_same(history, alone)


def frozen_below(name: str) -> bool:
    return not name.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1."))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_routers_of_frozen_layers_are_counted_in_every_layout(recompute: str, worlds: Worlds) -> None:
    options: dict[str, Any] = {"trainable": frozen_below, "recompute": recompute}
    (alone,) = worlds.run(1, learned, {}, **options)
    for history in worlds.run(2, learned, {"pp": 2}, **options):
        check_same(history, alone)


def test_in_bf16_the_tokens_of_many_microbatches_are_counted_to_the_last(worlds: Worlds) -> None:
    ((loads, tokens),) = worlds.run(1, counted_in_bf16)
    assert loads == pytest.approx([2 * tokens] * len(loads))


def counted_in_bf16() -> tuple[list[float], int]:
    """Choices that the routers of a step in bfloat16 have counted, by layer, and the tokens that were read."""
    engine = small_engine({}, EXPERTS, precision="bf16")
    rows = ragged_rows()
    for _ in range(3):  # more than 256, which bfloat16 does not add one to
        batch = make_microbatches(rows, torch.arange(16), engine, per_microbatch=1, share_bins=False)
        engine.train_step(batch, cross_entropy, count_targets)
    loads = [float(layer.router.sums[2:].sum()) for layer in expert_layers(engine.models).values()]
    return loads, 3 * int((rows.lengths - 1).sum())


@pytest.mark.parametrize(
    "options", [{"share_bins": False}, {"micro": 7}, {"recompute": "full"}, {"recompute": "selective"}], ids=str
)
def test_a_cut_of_the_batch_or_recomputation_changes_nothing(
    options: dict[str, Any], worlds: Worlds, alone: list[dict[str, float]]
) -> None:
    (history,) = worlds.run(1, learned, {}, **options)
    check_same(history, alone)


KINDS = ("muon", "adamw8bit")


@pytest.fixture(scope="module")
def alone_by_kind(worlds: Worlds) -> dict[str, list[dict[str, float]]]:
    return {kind: worlds.run(1, learned, {}, optim={"kind": kind})[0] for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "name"),
    gated(
        [("muon", "TP2xEP2"), ("muon", "EP2xDP2"), ("adamw8bit", "EP2")], [("muon", "EP2xDP2"), ("adamw8bit", "EP2")]
    ),
)
def test_other_optimizers_update_shared_experts_alike(
    kind: str, name: str, worlds: Worlds, alone_by_kind: dict[str, list[dict[str, float]]]
) -> None:
    size, layout = LAYOUTS[name]
    for history in worlds.run(size, learned, layout, optim={"kind": kind}):
        for one, two in zip(history, alone_by_kind[kind], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
            assert one["norm"] == pytest.approx(two["norm"], rel=1e-4)


def with_one_starved_expert() -> tuple[dict[str, float], set[str], set[str]]:
    """A router that never chooses the last expert of any layer."""
    engine = small_engine({}, {**EXPERTS, "experts": ExpertsConfig(count=3, chosen=1, ffn_size=8, normalise=False)})
    engine.observer = RouterStats(engine.models, engine.config, engine.grid)
    layers = expert_layers(engine.models)
    for layer in layers.values():
        choose_all_but_the_last(layer)
    batch = make_microbatches(ragged_rows(), torch.arange(16), engine, per_microbatch=4, share_bins=True)
    stats = engine.train_step(batch, cross_entropy, count_targets)
    return {**stats, **engine.observed}, *engine.gradient_names()


def choose_all_but_the_last(layer: ExpertLayer) -> None:
    """Of two opposite scores one is above 0, the score of the last expert."""
    with torch.no_grad():
        layer.router.weight[1] = -layer.router.weight[0]
        layer.router.weight[2] = 0.0


def test_an_expert_without_tokens_needs_no_gradient(worlds: Worlds) -> None:
    ((stats, reached, wanted),) = worlds.run(1, with_one_starved_expert)
    starved = {f"decoder.layers.{layer}.mlp.experts.local_experts.2.linear_fc1.weight" for layer in range(4)}
    assert stats["experts/unused"] == pytest.approx(1 / 3)
    assert wanted == reached
    assert not starved & wanted


def padding_and_counts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    engine = small_engine({}, EXPERTS, train=False)
    layer = next(iter(expert_layers(engine.models).values()))
    layer.shared_experts = None
    hidden = torch.randn(5, 2, 32)
    rows = torch.tensor([[1, 1, 1, 0, 0], [2, 2, 0, 0, 0]])
    layer.train()
    result, _ = layer(hidden, Context(None, None, origins=Origins(rows, 5.0, 1)))
    whole, _ = layer(hidden, None)
    return result, whole, layer.experts.tokens


def test_padding_goes_to_no_expert(worlds: Worlds) -> None:
    ((result, whole, tokens),) = worlds.run(1, padding_and_counts)
    inside = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    torch.testing.assert_close(result[inside], whole[inside])
    assert not result[~inside].any()
    assert whole[~inside].any()
    assert int(tokens.sum()) == 2 * 5 + 2 * 10


def test_a_shape_knows_which_layers_have_experts() -> None:
    config = GPTConfig.__new__(GPTConfig)
    config.experts, config.num_layers = EXPERTS["experts"], 4
    assert [config.has_experts(number) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert config.expert_layers == 3
