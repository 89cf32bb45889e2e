"""Context parallelism: ranks that share sequences train alike with one process, whatever masks, heads and other splits
there are, and keep only their part of the activations."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from megarl.config.sections.model import ExpertsConfig
from megarl.models.experts import RouterStats
from megarl.models.gpt import GPT
from megarl.models.sliced_attention import causal_after
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.passes import Outputs
from megarl.parallel.rows import Microbatch, Rows
from tests.gated import gated
from tests.parallel.engines import VOCAB, small_engine
from tests.planning.allocations import recorded
from tests.worlds import Worlds

STEPS = 3
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 32, "num_heads": 4, "max_positions": 512},
    "grouped heads, rotary, window": {
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "position": "rope",
        "sliding_window": 40,
        "max_positions": 512,
    },
    "experts": {
        "hidden_size": 32,
        "max_positions": 512,
        "experts": ExpertsConfig(count=4, chosen=2, ffn_size=24, balance=0.1, z_loss=0.01),
    },
}
LONG = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "position": "rope"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP2": (2, {"cp": 2}),
    "CP4": (4, {"cp": 4}),
    "CP2xTP2": (4, {"cp": 2, "tp": 2}),
    "CP2xTP2+SP": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "CP2xPP2": (4, {"cp": 2, "pp": 2}),
    "CP2xPP2 with virtual stages": (4, {"cp": 2, "pp": 2, "vpp": 2}),
    "CP2xDP2": (4, {"cp": 2}),
    "CP2xEP2": (2, {"cp": 2, "ep": 2}),
}


def ragged_rows(longest: int) -> Rows:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 3, longest, (7,), generator=generator)
    lengths[0] = 3
    inside = torch.arange(longest) < lengths[:, None]
    tokens = torch.randint(1, VOCAB, inside.shape, generator=generator) * inside
    return Rows(tokens, lengths, inside.float())


def logprobs(engine: Engine, batch: list[Microbatch]) -> torch.Tensor:
    def of_tokens(model: GPT, hidden: torch.Tensor, batch: Microbatch) -> Outputs:
        found = model.logprobs(hidden, batch.targets, batch.target_mask, entropy=True)
        assert found.entropy is not None
        return {"logprobs": found.logprobs, "entropy": found.entropy}

    found = engine.forward(batch, of_tokens)
    return torch.stack([torch.stack([each["logprobs"].sum(), each["entropy"].sum()]) for each in found]).sum(0)


def learned(
    layout: dict[str, Any], model: dict[str, Any], longest: int, *, share_bins: bool = False, **options: Any
) -> list[dict[str, float]]:
    engine = small_engine(layout, model, **options)
    if engine.config.experts is not None:
        engine.observer = RouterStats(engine.models, engine.config, engine.grid)
    rows, history = ragged_rows(longest), []
    for _ in range(STEPS):
        batch = make_microbatches(rows, torch.arange(len(rows)), engine, per_microbatch=2, share_bins=share_bins)
        stats = engine.train_step(batch, cross_entropy, count_targets)
        reached, wanted = engine.gradient_names()
        assert not wanted - reached
        history.append({**stats, **engine.observed, "norm": engine.apply_gradients()})
    batch = make_microbatches(rows, torch.arange(len(rows)), engine, per_microbatch=2, share_bins=share_bins)
    sums = engine.grid.sum_over_data(logprobs(engine, batch).double())
    history.append(dict(zip(("logprobs", "entropy"), sums.tolist(), strict=True)))
    return history


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "short": ("plain", 30, {}),
    "long": ("plain", 400, {}),
    "packed": ("plain", 400, {"share_bins": True}),
    "recompute all": ("plain", 400, {"recompute": "full"}),
    "recompute attention": ("plain", 400, {"recompute": "selective"}),
    "grouped": ("grouped heads, rotary, window", 400, {}),
    "grouped, packed": ("grouped heads, rotary, window", 400, {"share_bins": True}),
    "experts": ("experts", 60, {"share_bins": True}),
}
ALL = [(case, layout) for case in CASES for layout in LAYOUTS if "EP" not in layout or case == "experts"]
FAST = [
    ("short", "CP4"),
    ("long", "CP2"),
    ("long", "CP2xPP2 with virtual stages"),
    ("recompute all", "CP2"),
    ("recompute attention", "CP2"),
    ("grouped, packed", "CP2xTP2+SP"),
    ("experts", "CP2xEP2"),
    ("experts", "CP2xTP2+SP"),
]


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> Callable[[str], list[dict[str, float]]]:
    """What returns the steps of a case in one process."""

    @cache
    def made(case: str) -> list[dict[str, float]]:
        model, longest, options = CASES[case]
        (history,) = worlds.run(1, learned, {}, MODELS[model], longest, **options)
        assert history[0]["loss"] != history[STEPS - 1]["loss"]
        return history  # type: ignore[no-any-return]

    return made


@pytest.mark.parametrize(("case", "layout"), gated(ALL, [case for case in ALL if case not in FAST]))
def test_ranks_that_share_sequences_train_as_one_process(
    case: str, layout: str, worlds: Worlds, alone: Callable[[str], list[dict[str, float]]]
) -> None:
    model, longest, options = CASES[case]
    size, where = LAYOUTS[layout]
    for history in worlds.run(size, learned, where, MODELS[model], longest, **options):
        for one, two in zip(history, alone(case), strict=True):
            assert one.keys() == two.keys()
            for name, value in two.items():
                assert one[name] == pytest.approx(value, rel=2e-6), name


def kept_and_peak(layout: dict[str, Any], time: int) -> tuple[int, int]:
    """Bytes that a forward pass leaves for the backward pass, and the peak of both, of one row of this length."""
    engine = small_engine(layout, {**LONG, "max_positions": time})
    tokens = torch.randint(1, VOCAB, (1, time), generator=torch.Generator().manual_seed(0))
    rows = Rows(tokens, torch.tensor([time]), torch.ones(1, time))
    (batch,) = make_microbatches(rows, torch.arange(1), engine, per_microbatch=1, share_bins=False)
    (model,) = engine.models
    engine.train()
    with recorded() as forward:
        hidden = model(batch)
    loss = model.logprobs(hidden, batch.targets, batch.target_mask).logprobs.sum()
    with recorded() as backward:
        loss.backward()
    return forward.left, forward.left + backward.peak


@pytest.mark.parametrize("time", gated([4096, 32768], [32768]))
def test_each_of_two_ranks_keeps_half_of_the_activations(time: int, worlds: Worlds) -> None:
    ((kept, peak),) = worlds.run(1, kept_and_peak, {}, time, timeout=1200)
    for mine, my_peak in worlds.run(2, kept_and_peak, {"cp": 2}, time, timeout=1200):
        assert mine < 0.6 * kept
        assert my_peak < 0.6 * peak


def twice_with_dropout() -> torch.Tensor:
    """Positions of this rank [time] whose states differ between two passes that drop weights of attention alone."""
    engine = small_engine({"cp": 2}, {**MODELS["plain"], "dropout": 0.5})
    (model,) = engine.models
    engine.config.hidden_dropout = 0.0
    engine.train()
    rows = ragged_rows(400)
    (batch, *_) = make_microbatches(rows, torch.arange(len(rows)), engine, per_microbatch=1, share_bins=False)
    with torch.no_grad():
        first, second = model(batch), model(batch)
    return (first != second).any(-1)[:, 0]


def test_weights_of_attention_are_dropped_in_every_slice(worlds: Worlds) -> None:
    for differs in worlds.run(2, twice_with_dropout):
        assert differs[1:].all()  # the very first position attends to itself alone


def test_without_a_mask_the_last_positions_attend_to_all_before_them() -> None:
    generator = torch.Generator().manual_seed(1)
    for kv_heads in (4, 2, 1):
        inputs = [torch.randn(2, heads, time, 16, generator=generator) for heads, time in
                  ((4, 50), (kv_heads, 200), (kv_heads, 200))]  # fmt: skip
        ours, theirs = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
        found = causal_after(*ours, 0.3)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *theirs, torch.ones(50, 200, dtype=torch.bool).tril(150), scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found, wanted)
        weights = torch.randn(found.shape, generator=generator)
        (found * weights).sum().backward()
        (wanted * weights).sum().backward()
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, two.grad)
