"""What counts as a difference between the outcome of a case and its reference."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from megarl.conformance import compare as comparing
from megarl.conformance.compare import LIMITS, Difference, compare, compare_starts
from megarl.conformance.training import Outcome, Outcomes


def outcome() -> Outcomes:
    weight = torch.tensor([[1.0, -2.0], [1e-3, 0.0]])
    return {
        "sft": Outcome(
            stats={"loss": [4.0, 3.0]},
            norms=[2.0, 1.0],
            own_norms=[2.0, 1.0],
            outputs={"logprobs": torch.tensor([[-1.0, 0.0]])},
            first_gradients={"weight": [weight.clone()]},
            last_gradients={"weight": [weight.clone()]},
            parameters={"weight": [weight.clone(), weight.clone()], "frozen": [weight.clone()]},
            moved={"frozen": 0.0},
        )
    }


def unlike(change: Callable[[Outcome], object]) -> list[Difference]:
    """The differences beyond rounding from an outcome in which something was changed."""
    changed = copy.deepcopy(outcome())
    change(changed["sft"])
    return [one for one in compare(changed, outcome()) if not one.is_rounding]


def test_equal_outcomes_agree_in_all_kinds_of_numbers() -> None:
    differences = compare(outcome(), outcome())
    assert all(one.is_rounding and one.size == 0 for one in differences)
    assert {one.quantity for one in differences} == LIMITS.keys() - {comparing.UNREACHED}


def second_copy(outcome: Outcome) -> None:
    outcome.parameters["weight"][1][0, 0] += 1e-3


def small_value(outcome: Outcome) -> None:
    outcome.first_gradients["weight"][0][1, 1] = 1e-4


def lost(outcome: Outcome) -> None:
    outcome.last_gradients["weight"][0][0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "quantity", "where"),
    [
        (lambda one: one.stats["loss"].__setitem__(1, 3.001), comparing.LOSS, "loss, step 2"),
        (lambda one: one.stats.update(extra=[0.0, 0.0]), comparing.LOSS, "extra has none in one process"),
        (lambda one: one.stats.pop("loss"), comparing.LOSS, "loss is missing"),
        (lambda one: one.outputs["logprobs"].add_(1e-3), comparing.OUTPUTS, "logprobs"),
        (small_value, comparing.FIRST, "weight"),
        (lost, comparing.LAST, "weight"),
        (lambda one: one.first_gradients.pop("weight"), comparing.FIRST, "weight is missing"),
        (second_copy, comparing.PARAMETERS, "weight, copy 2 of 2"),
        (lambda one: one.parameters.update(weight=[torch.zeros(3)]), comparing.PARAMETERS, "weight"),
        (lambda one: one.moved.update(frozen=1e-9), comparing.MOVED, "frozen"),
        (lambda one: one.unreached.append("weight"), comparing.UNREACHED, "weight"),
        (lambda one: one.own_norms.__setitem__(0, 2.1), comparing.OWN_NORM, "the norm, step 1"),
    ],
)
def test_a_difference_is_named(change: Callable[[Outcome], object], quantity: str, where: str) -> None:
    (found,) = unlike(change)
    assert (found.objective, found.quantity, found.where) == ("sft", quantity, where)


def test_rounding_is_no_difference() -> None:
    def round_off(one: Outcome) -> None:
        one.stats["loss"][0] *= 1 + 9e-6
        one.parameters["weight"][0][0, 1] *= 1 + 9e-6
        one.first_gradients["weight"][0][1, 1] += 1e-5  # beside values of 2

    assert not unlike(round_off)


def test_a_start_is_compared_in_what_both_train_before_the_first_update() -> None:
    found, wanted = outcome(), outcome()
    found["sft"].stats["loss"][1] = found["sft"].norms[0] = found["sft"].own_norms[0] = 7.0
    found["sft"].parameters = {}
    wanted["sft"].first_gradients["more"] = [torch.ones(1)]
    assert all(one.is_rounding for one in compare_starts(found, wanted))
    found["sft"].first_gradients["weight"][0][0, 0] += 1e-3
    assert [one.quantity for one in compare_starts(found, wanted) if not one.is_rounding] == [comparing.FIRST]
    found["sft"].moved["frozen"] = 1.0
    assert len([one for one in compare_starts(found, wanted) if not one.is_rounding]) == 2
