"""RMSprop and SGD in Megatron's distributed optimizer: torch's numbers, in every layout, with no state to spare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.sections.optim import OptimConfig
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.update_rules import moments_of
from tests.parallel.engines import batches, small_engine, train
from tests.worlds import Worlds

KINDS: dict[str, dict[str, Any]] = {
    "rmsprop": {"kind": "rmsprop"},
    "rmsprop with momentum": {"kind": "rmsprop", "momentum": 0.9},
    "sgd": {"kind": "sgd", "lr": 0.1},
    "sgd with momentum": {"kind": "sgd", "lr": 0.02, "momentum": 0.9},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {"tp": 2}),
    "PP2+vpp2": (2, {"pp": 2, "vpp": 2}),
}
TINY = {"num_layers": 1, "hidden_size": 8, "num_heads": 1}


def torchs(settings: OptimConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The same optimizer from torch; the learning rate is set before each step."""
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=settings.momentum)
    return torch.optim.RMSprop(
        parameters, lr=0.0, alpha=settings.beta2, eps=settings.eps, momentum=settings.momentum, weight_decay=0
    )


def beside_torch(settings: dict[str, Any], precision: str, steps: int = 20) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights after some steps, and those of torch's optimizer, which starts from the same and has the same gradients.

    In bf16, torch's has float32 weights, which are rounded at the end.
    """
    optim = {**settings, "weight_decay": 0.0, "clip_grad": 0.0}
    engine = small_engine({}, TINY, optim=optim, precision=precision)
    ours = dict(engine.parameters())
    theirs = {name: parameter.detach().float().clone() for name, parameter in ours.items()}
    optimizer = torchs(OptimConfig(**optim), list(theirs.values()))
    for step in range(steps):
        engine.train_step(batches(engine, step, rows=2), cross_entropy, count_targets)
        for name, parameter in ours.items():
            theirs[name].grad = parameter.main_grad.clone()  # type: ignore[attr-defined]
        optimizer.param_groups[0]["lr"] = engine.learning_rate
        engine.apply_gradients()
        optimizer.step()
    return {name: (value.detach().clone(), theirs[name].to(value.dtype)) for name, value in ours.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_torchs_optimizer(worlds: Worlds, kind: str, precision: str) -> None:
    (found,) = worlds.run(1, beside_torch, KINDS[kind], precision)
    assert len(found) > 5
    for name, (ours, theirs) in found.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_trains_as_one_process(worlds: Worlds, kind: str, layout: str) -> None:
    wanted = worlds.run(1, train, {}, 6, optim=KINDS[kind])[0]
    size, grid = LAYOUTS[layout]
    for history in worlds.run(size, train, grid, 6, optim=KINDS[kind]):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(history, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-4, abs=1e-6)


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
    return share, states


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_holds_its_share_of_the_states_that_the_kind_has(worlds: Worlds, kind: str) -> None:
    (whole, _), *halves = [*worlds.run(1, sizes, KINDS[kind]), *worlds.run(2, sizes, KINDS[kind])]
    assert sum(share for share, _ in halves) == whole
    for share, states in halves:
        assert share == pytest.approx(whole / 2, rel=0.01)
        assert states == dict.fromkeys(moments_of(OptimConfig(**KINDS[kind])), share)


def test_states_are_those_that_the_settings_need() -> None:
    needed = [moments_of(OptimConfig(**settings)) for settings in KINDS.values()]
    assert needed == [("exp_avg_sq",), ("exp_avg", "exp_avg_sq"), (), ("exp_avg",)]
    assert moments_of(OptimConfig()) == ("exp_avg", "exp_avg_sq")
