"""A reward of several terms: what is added, what is left out, what is logged, and when stored scores count again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megarl.errors import NumericsError
from megarl.experience.sum_scorer import SumScorer, Weighted
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores, weighted_sum
from tests.refusals import refused


class Fixed:
    """A scorer that gives the scores it was made with."""

    def __init__(self, values: list[Score | None], fingerprint: str = "a", **counts: Any) -> None:
        self.values, self.fingerprint, self.counts = values, fingerprint, counts
        self.name = "fixed"
        self.asked: list[tuple[int, int]] = []
        self.forgotten = -1
        self.closed = False

    def score(self, prompts: Sequence[Any], rollouts: Sequence[Any], *, stream: int, phase: int) -> Scores:
        self.asked.append((stream, phase))
        return Scores(list(self.values), **self.counts)

    def forget(self, before: int) -> None:
        self.forgotten = before

    def close(self) -> None:
        self.closed = True


def summed(*terms: tuple[float, Fixed]) -> SumScorer:
    return SumScorer([Weighted(scorer, weight, f"term{number}") for number, (weight, scorer) in enumerate(terms)])


def test_scores_are_added_with_their_weights_and_each_is_a_part_without_its_weight() -> None:
    first = Fixed([1.0, 2.0], failed_calls=1, reencoded=2, parts={"inner": [5.0, 6.0]})
    second = Fixed([10.0, 20.0], failed_calls=2, repeated_calls=3, reencoded=1)
    found = summed((0.5, first), (-1.0, second)).score([], [], stream=3, phase=7)
    assert found.values == [-9.5, -19.0]
    assert found.parts == {"term0": [1.0, 2.0], "term0/inner": [5.0, 6.0], "term1": [10.0, 20.0]}
    assert (found.failed_calls, found.repeated_calls, found.reencoded) == (3, 3, 3)
    assert first.asked == second.asked == [(3, 7)]


def test_a_response_that_one_term_gives_no_score_has_none_and_is_counted_once() -> None:
    found = summed((1.0, Fixed([None, 2.0, 3.0])), (1.0, Fixed([1.0, None, 4.0]))).score([], [], stream=0, phase=0)
    assert found.values == [None, None, 7.0]
    assert found.dropped == 2
    assert found.parts == {"term0": [None, 2.0, 3.0], "term1": [1.0, None, 4.0]}


def test_a_sum_that_float32_cannot_hold_ends_the_run_by_its_key() -> None:
    with refused(NumericsError, key="reward.terms", names=("1e+308", "term0")):
        summed((1e308, Fixed([3.0])), (1.0, Fixed([1.0]))).score([], [], stream=0, phase=0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0], 0.5 + 6.0),
        ([[1.0, 2.0], 2.0], [0.5, 1.0 + 6.0]),
        ([2.0, [1.0, 2.0]], [3.0, 6.0 + 1.0]),
        ([[1.0, 2.0], [3.0, 4.0]], [0.5 + 9.0, 1.0 + 12.0]),
    ],
)
def test_a_number_is_added_at_the_last_token_of_rewards_per_token(scores: list[Score], expected: Score) -> None:
    assert weighted_sum(scores, [0.5, 3.0]) == expected


def test_other_weights_or_other_scorers_are_other_scores() -> None:
    def printed(weight: float, name: str) -> str:
        return summed((weight, Fixed([], name)), (1.0, Fixed([], "z"))).fingerprint

    assert printed(0.5, "a") == printed(0.5, "a")
    assert len({printed(0.5, "a"), printed(0.25, "a"), printed(0.5, "b")}) == 3


def test_every_term_forgets_and_is_closed() -> None:
    first, second = Fixed([]), Fixed([])
    both = summed((1.0, first), (1.0, second))
    both.forget(4)
    both.close()
    assert (first.forgotten, second.forgotten) == (4, 4)
    assert (first.closed, second.closed) == (True, True)
