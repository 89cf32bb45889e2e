"""Every invariant names itself when it breaks, stops the run or is warned of once, and holds its tongue otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.errors import InvariantError
from megarl.experience.invariants import Invariants
from megarl.parallel.device import CPU, GPU, assumed
from tests.refusals import refused

TRAINABLE = {"embedding", "value_head.inner", "value_head.outer"}


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    """Bounds are a CPU's, whatever settings the tests run with."""
    with assumed(CPU):
        yield


def invariants(mode: str = "strict", precision: str = "fp32") -> Invariants:
    return Invariants(mode, precision, lambda: 6)


def engine(*with_gradient: str) -> Any:
    return SimpleNamespace(name="policy", gradient_names=lambda: (set(with_gradient), set(TRAINABLE)))


def holder(**digests: list[int]) -> Any:
    """An engine with the checksums of its tensors' copies."""
    return SimpleNamespace(name="policy", grid=SimpleNamespace(layout="TP2"), digests_of_copies=lambda: digests)


def copied_in_part(it: Invariants) -> None:
    it.arrived(holder(bias=[1, 2], norm=[3], weight=[4]), holder(bias=[2], weight=[4, 5]), "in phase 7")


def value_head_forgotten(it: Invariants) -> None:
    it.gradients(engine("embedding"), learns=True, fresh=True)


BROKEN: dict[str, tuple[Callable[[Invariants], None], Any, tuple[str, ...]]] = {
    "kl_zero": (lambda it: it.same_weights(1e-12), 1e-12, ("1.00e-12",)),
    "logprob_drift": (lambda it: it.drift(2e-3), 2e-3, ("2.00e-03", "0.001")),
    "ratio_one": (lambda it: it.on_policy(1.0001, 0.0, 0.2), 1.0001, ("1.0001000",)),
    "nothing_clipped": (lambda it: it.on_policy(1.0, 0.01, 0.2), 0.01, ("1.00%",)),
    "token_count": (lambda it: it.tokens(29, 30), 29, ("29", "30")),
    "weights_arrived": (copied_in_part, ["weight"], ("weight", "TP2")),
    "gradients": (value_head_forgotten, ["value_head.inner", "value_head.outer"], ("policy",)),
}
"""How each is broken, the value that breaks it, and how its line shows that."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_invariant_stops_a_strict_run_by_name(name: str) -> None:
    break_it, value, shown = BROKEN[name]
    offers = {"health.invariants": ["warn"]}
    with refused(InvariantError, key=name, value=value, offers=offers, names=("phase 7", *shown)) as found:
        break_it(invariants())
    assert found.error.exit_code == 3


def test_on_a_gpu_two_passes_of_the_same_weights_may_round_differently() -> None:
    with assumed(GPU):
        invariants().same_weights(1e-6)
        with refused(InvariantError, key="kl_zero", value=1e-3):
            invariants().same_weights(1e-3)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_invariant_is_warned_of_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    break_it, _, shown = BROKEN[name]
    it = invariants("warn")
    for _ in range(3):
        break_it(it)
    assert len(caplog.messages) == 1
    for word in (name, "phase 7", *shown):
        assert word in caplog.messages[0]


def test_nan_holds_nowhere() -> None:
    for breaks in (
        lambda it: it.same_weights(float("nan")),
        lambda it: it.drift(float("nan")),
        lambda it: it.on_policy(float("nan"), 0.0, 0.2),
    ):
        with refused(InvariantError):
            breaks(invariants())


def test_what_holds_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    it = invariants("warn")
    it.same_weights(0.0)
    it.drift(1e-4)
    it.arrived(holder(bias=[1, 2], norm=[3]), holder(bias=[2, 1, 2]), "in phase 7")
    it.on_policy(1.000009, 0.0, 0.2)
    it.tokens(30, 30)
    it.gradients(engine(*TRAINABLE), learns=True, fresh=True)
    assert not caplog.records


def test_a_run_without_the_key_is_not_told_to_set_it() -> None:
    with refused(InvariantError, key="weights_arrived", offers={}) as found:
        copied_in_part(Invariants("strict", "fp32", lambda: 6, has_key=False))
    assert "health.invariants" not in found.line


def test_what_the_loss_corrects_is_not_checked() -> None:
    Invariants("strict", "fp32", lambda: 6, corrected=True).drift(1.0)


def test_bf16_has_wider_bounds_but_the_reference_is_still_exact() -> None:
    it = invariants(precision="bf16")
    it.drift(4e-2)
    it.on_policy(1.04, 0.0, 0.2)
    with refused(InvariantError, key="kl_zero", value=1e-12):
        it.same_weights(1e-12)
    with refused(InvariantError, key="ratio_one", value=1.06):
        it.on_policy(1.06, 0.0, 0.2)


def test_in_bf16_a_clip_range_below_the_rounding_may_clip() -> None:
    invariants(precision="bf16").on_policy(1.0, 0.6, 3e-4)
    with refused(InvariantError, key="nothing_clipped", value=0.6):
        invariants(precision="bf16").on_policy(1.0, 0.6, 0.2)
    with refused(InvariantError, key="nothing_clipped", value=0.6):
        invariants().on_policy(1.0, 0.6, 3e-4)


def test_only_the_first_step_is_checked() -> None:
    it = invariants()
    it.gradients(engine(*TRAINABLE), learns=True, fresh=True)
    it.gradients(engine(), learns=True, fresh=True)  # later steps may do as they like


def test_a_step_with_nothing_to_learn_from_leaves_it_to_the_next() -> None:
    """A first phase may have taught nothing at all."""
    it = invariants()
    for phase in range(5):
        it.gradients(engine(), learns=False, fresh=phase == 0)
    with refused(InvariantError, key="gradients", value=["value_head.inner"], names=("policy",)):
        it.gradients(engine("embedding", "value_head.outer"), learns=True, fresh=False)


def test_each_engine_is_checked_when_it_begins_to_train() -> None:
    """A critic may train for phases before the policy does."""
    critic = SimpleNamespace(name="critic", gradient_names=lambda: (set(TRAINABLE), set(TRAINABLE)))
    it: Any = invariants()
    for _ in range(4):
        it.gradients(critic, learns=True, fresh=True)
    with refused(InvariantError, key="gradients", value=["value_head.inner", "value_head.outer"], names=("policy",)):
        it.gradients(engine("embedding"), learns=True, fresh=True)


def test_a_resumed_run_is_past_its_first_steps() -> None:
    it = invariants()
    for _ in range(4):
        it.gradients(engine(), learns=True, fresh=False)
