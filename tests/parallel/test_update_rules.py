"""Update rules in Megatron's distributed optimizer: published numbers, in every layout, with no state to spare."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megarl.config.sections.optim import OptimConfig
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.update_rules import moments_of
from tests.gated import gated
from tests.parallel.engines import batches, small_engine, train
from tests.worlds import Worlds

KINDS: dict[str, dict[str, Any]] = {
    "rmsprop": {"kind": "rmsprop"},
    "rmsprop with momentum": {"kind": "rmsprop", "momentum": 0.9},
    "sgd": {"kind": "sgd", "lr": 0.1},
    "sgd with momentum": {"kind": "sgd", "lr": 0.02, "momentum": 0.9},
    "lion": {"kind": "lion", "lr": 2e-4},
    "muon": {"kind": "muon"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {"tp": 2}),
    "TP2xDP2": (4, {"tp": 2}),
    "PP2+vpp2": (2, {"pp": 2, "vpp": 2}),
}
Alone = Callable[[str], list[tuple[float, float]]]
TINY = {"num_layers": 1, "hidden_size": 8, "num_heads": 1}


class PublishedLion:
    """Algorithm 2 of the paper, in float64."""

    def __init__(self, parameters: list[Tensor], beta1: float, beta2: float) -> None:
        self.parameters, self.beta1, self.beta2 = parameters, beta1, beta2
        self.exact = [parameter.double() for parameter in parameters]
        self.momentum = [torch.zeros_like(value) for value in self.exact]
        self.param_groups = [{"lr": 0.0}]

    def step(self) -> None:
        for parameter, value, m in zip(self.parameters, self.exact, self.momentum, strict=True):
            assert parameter.grad is not None
            g = parameter.grad.double()
            value -= self.param_groups[0]["lr"] * torch.sign(self.beta1 * m + (1 - self.beta1) * g)
            m.copy_(self.beta2 * m + (1 - self.beta2) * g)
            parameter.copy_(value)


def published(settings: OptimConfig, parameters: dict[str, Tensor]) -> list[Any]:
    """The same optimizer written by others; the learning rate is set before each step."""
    everything = list(parameters.values())
    betas = (settings.beta1, settings.beta2)
    momentum = settings.momentum_in_force
    if settings.kind == "lion":
        return [PublishedLion(everything, *betas)]
    if settings.kind == "muon":
        in_layers = {name for name, value in parameters.items() if "layers." in name and value.dim() == 2}
        matrices = [parameters[name] for name in sorted(in_layers)]
        others = [value for name, value in parameters.items() if name not in in_layers]
        assert len(matrices) == 4
        return [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=0, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=betas, eps=settings.eps, weight_decay=0),
        ]
    if settings.kind == "sgd":
        return [torch.optim.SGD(everything, lr=0.0, momentum=momentum)]
    options = {"alpha": settings.beta2, "eps": settings.eps, "momentum": momentum}
    return [torch.optim.RMSprop(everything, lr=0.0, weight_decay=0, **options)]


def beside_others(settings: dict[str, Any], precision: str, steps: int = 12) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights after some steps, and those of an optimizer that starts from the same and has the same gradients.

    In bf16, the other one has float32 weights, which are rounded at the end. torch's Muon multiplies in float32, too.
    """
    optim = {**settings, "weight_decay": 0.0, "clip_grad": 0.0}
    engine = small_engine({}, TINY, optim=optim, precision=precision)
    ours = dict(engine.parameters())
    theirs = {name: parameter.detach().float().clone() for name, parameter in ours.items()}
    optimizers = published(OptimConfig(**optim), theirs)
    for step in range(steps):
        engine.train_step(batches(engine, step, rows=2), cross_entropy, count_targets)
        for name, parameter in ours.items():
            theirs[name].grad = parameter.main_grad.clone()  # type: ignore[attr-defined]
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = engine.learning_rate
        engine.apply_gradients()
        with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
            for optimizer in optimizers:
                optimizer.step()
    return {name: (value.detach().clone(), theirs[name].to(value.dtype)) for name, value in ours.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_published_optimizer(worlds: Worlds, kind: str, precision: str) -> None:
    (found,) = worlds.run(1, beside_others, KINDS[kind], precision)
    assert len(found) > 5
    for name, (ours, theirs) in found.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> Alone:
    """The course of a kind in one process."""
    return cache(lambda kind: worlds.run(1, train, {}, 4, optim={"kind": kind, **KINDS.get(kind, {})})[0])


# Muon gathers whole matrices in every layout in its own way; the others' states are cut with the weights.
CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
ONE_MORE = {"rmsprop with momentum": "TP2", "sgd with momentum": "TP2xDP2", "lion": "PP2+vpp2"}
LATER = [(kind, layout) for kind, layout in CASES if kind != "muon" and layout not in ("DP2", ONE_MORE.get(kind))]


@pytest.mark.parametrize(("kind", "layout"), gated(CASES, LATER))
def test_every_layout_trains_as_one_process(worlds: Worlds, alone: Alone, kind: str, layout: str) -> None:
    wanted = alone(kind)
    size, grid = LAYOUTS[layout]
    for history in worlds.run(size, train, grid, 4, optim=KINDS[kind]):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(history, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-4, abs=1e-6)


def overfitted(settings: dict[str, Any], steps: int = 40) -> list[float]:
    """The losses of steps over one batch."""
    engine = small_engine({}, {"num_layers": 2}, optim={"lr": 3e-3, "schedule": "constant", **settings})
    losses = []
    for _ in range(steps):
        losses.append(engine.train_step(batches(engine, 0), cross_entropy, count_targets)["loss"])
        engine.apply_gradients()
    return losses


def test_moments_of_eight_bits_train_as_float32_does(worlds: Worlds) -> None:
    exact, rounded = (worlds.run(1, overfitted, {"kind": kind})[0] for kind in ("adamw", "adamw8bit"))
    assert exact[-1] < 0.2 * exact[0]
    assert rounded != exact
    assert rounded[:10] == pytest.approx(exact[:10], rel=0.005)
    assert rounded == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_differ_by_the_rounding_of_eight_bits(worlds: Worlds, alone: Alone, layout: str) -> None:
    """Blocks are cut elsewhere, which changes what is rounded, and no more."""
    wanted = alone("adamw8bit")
    size, grid = LAYOUTS[layout]
    for history in worlds.run(size, train, grid, 4, optim={"kind": "adamw8bit"}):
        for found, expected in zip(history, wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


def sizes(settings: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Elements of this rank's share of the parameters, and of each of its states."""
    engine: Engine = small_engine({}, optim=settings)
    engine.train_step(batches(engine, 0), cross_entropy, count_targets)
    engine.apply_gradients()
    assert engine.optimizer is not None
    share, states = 0, {}
    for part in engine.optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            share += parameter.numel()
            for name, value in state.items():
                states[name] = states.get(name, 0) + value.untyped_storage().nbytes() // value.element_size()
                assert value.dtype in (torch.float32, torch.uint8)
    return share, states


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "muon"])
def test_a_replica_holds_its_share_of_the_states_that_the_kind_has(worlds: Worlds, kind: str) -> None:
    (whole, _), *halves = [*worlds.run(1, sizes, KINDS[kind]), *worlds.run(2, sizes, KINDS[kind])]
    assert sum(share for share, _ in halves) == whole
    for share, states in halves:
        assert share == pytest.approx(whole / 2, rel=0.01)
        assert states == dict.fromkeys(moments_of(OptimConfig(**KINDS[kind])), share)


# Of small_engine: 4 layers of 64 channels, which attend with 4 * 64 * 64 weights and have a gated MLP of 12 * 64 * 64;
# two norms of 64 each, and a last one; two tables of 104 rows.
MATRICES, NORMS, TABLES = 4 * 16 * 64 * 64, 4 * 2 * 64 + 64, 2 * 104 * 64


def test_muon_keeps_one_state_for_matrices_and_two_for_the_rest(worlds: Worlds) -> None:
    (one,), halves = worlds.run(1, sizes, {"kind": "muon"}), worlds.run(2, sizes, {"kind": "muon"})
    assert one == (MATRICES + NORMS + TABLES, {"exp_avg": MATRICES + NORMS + TABLES, "exp_avg_sq": NORMS + TABLES})
    assert sum(states["exp_avg"] for _, states in halves) == one[1]["exp_avg"]
    assert sum(states["exp_avg_sq"] for _, states in halves) == one[1]["exp_avg_sq"]


def test_moments_of_eight_bits_take_a_byte_a_value_and_norms_keep_float32(worlds: Worlds) -> None:
    (one,), halves = worlds.run(1, sizes, {"kind": "adamw8bit"}), worlds.run(2, sizes, {"kind": "adamw8bit"})
    for moment in ("exp_avg", "exp_avg_sq"):
        assert one[1][moment] == sum(states.get(moment, 0) for _, states in halves) == NORMS
        codes, absmax = f"{moment}_codes", f"{moment}_absmax"
        assert one[1][codes] == sum(states[codes] for _, states in halves) == MATRICES + TABLES
        assert one[1][absmax] == (MATRICES + TABLES) / 256
    assert len(one[1]) == 6


def test_states_are_those_that_the_settings_need() -> None:
    needed = [moments_of(OptimConfig(**settings)) for settings in KINDS.values()]
    assert needed == [
        ("exp_avg_sq",),
        ("exp_avg", "exp_avg_sq"),
        (),
        ("exp_avg",),
        ("exp_avg",),
        ("exp_avg", "exp_avg_sq"),
    ]
    assert moments_of(OptimConfig()) == ("exp_avg", "exp_avg_sq")
