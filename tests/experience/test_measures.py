"""Measures of several responses per prompt, against numbers worked out by hand and against enumeration."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations

import pytest

from megarl.experience.measures import best_of, clustered_error, measures, pass_at, powers_of_two, vote


def enumerated(scores: Sequence[float], k: int) -> float:
    """The mean, over all subsets of k scores, of the largest one."""
    subsets = list(combinations(scores, k))
    return math.fsum(map(max, subsets)) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n: int) -> None:
    for right in range(n + 1):
        scores = [1.0] * right + [0.0] * (n - right)
        for k in range(1, n + 1):
            assert pass_at(n, right, k) == pytest.approx(enumerated(scores, k), abs=1e-14)
            assert best_of(scores, k) == pytest.approx(enumerated(scores, k), abs=1e-14)


def test_best_of_k_is_the_mean_largest_score_of_all_subsets() -> None:
    draw = random.Random(3)
    for n in (1, 2, 3, 7):
        scores = [draw.choice([-2.0, 0.5, draw.gauss(0, 1)]) for _ in range(n)]
        for k in range(1, n + 1):
            assert best_of(scores, k) == pytest.approx(enumerated(scores, k), abs=1e-13)


def test_pass_at_k_of_many_responses_is_computed_without_huge_numbers() -> None:
    exact = 1 - math.comb(9_990, 100) / math.comb(10_000, 100)
    assert pass_at(10_000, 10, 100) == pytest.approx(exact, rel=1e-12)
    assert best_of([0.0] * 9_990 + [1.0] * 10, 100) == pytest.approx(exact, rel=1e-12)
    assert 0 < pass_at(2**20, 1, 1) == pytest.approx(2**-20)


def test_the_error_of_the_mean_takes_prompts_as_the_unit() -> None:
    # Means of the prompts: 1, 0 and 0.5. Their deviation with ddof 1 is 0.5, divided by sqrt(3).
    assert clustered_error([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]) == pytest.approx(0.5 / math.sqrt(3))
    # Unequal numbers: the mean is 3/4; residuals of the prompts add up to 3/4 and -3/4; sqrt(2 * 2 * 9/16) / 4.
    assert clustered_error([[1.0, 1.0, 1.0], [0.0]]) == pytest.approx(0.375)
    assert clustered_error([[1.0, 0.0]]) is None
    assert clustered_error([[1.0, 0.0], []]) is None


def test_a_vote_scores_the_most_frequent_answer() -> None:
    assert vote([1.0, 0.0, 1.0], ["42", "41", "42"]) == 1.0
    assert vote([0.0, 1.0, 1.0, 0.0], ["a", "b", "b", "a"]) == 0.0, "of equally frequent answers the first wins"
    assert vote([0.2, 0.6, 0.9], ["a", "a", "b"]) == pytest.approx(0.4), "the mean of its scores"
    assert vote([1.0, 0.0, 0.0], ["a", None, None]) == 1.0, "responses without an answer do not vote"
    assert vote([1.0, 0.0], [None, None]) == 0.5, "without any answer, the mean of all"


def test_powers_of_two_end_with_the_number_itself() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 4, 6)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]]


def test_measures_have_these_names_and_values() -> None:
    # pass@2 of the prompts: 1 - C(2,2)/C(4,2) = 5/6 for two right of four, 0, and 1 - C(3,2)/C(4,2) = 1/2.
    groups = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    answers = [["a", "a", "b", "c"], ["a", "b", "c", "d"], ["a", "b", "a", "a"]]
    found = measures(groups, answers)
    values = {"eval/vote": [1.0, 0.0, 0.0], "eval/pass@1": [0.5, 0.0, 0.25]}
    values |= {"eval/pass@2": [5 / 6, 0.0, 0.5], "eval/pass@4": [1.0, 0.0, 1.0]}
    values |= {f"eval/best@{k}": values[f"eval/pass@{k}"] for k in (1, 2, 4)}
    expected = {"eval/score_se": 0.25 / math.sqrt(3)}
    for name, per_prompt in values.items():
        mean = sum(per_prompt) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in per_prompt) / 2)
        expected |= {name: mean, f"{name}_se": deviation / math.sqrt(3)}
    assert found == pytest.approx(expected)


def test_pass_at_k_needs_scores_of_0_and_1() -> None:
    assert not any("pass" in name for name in measures([[0.0, 1.0], [0.5, 1.0]]))
    assert measures([[0.0, 1.0], [0.5, 1.0]])["eval/best@2"] == 1.0


def test_prompts_with_too_few_scores_are_left_out_of_best_and_pass() -> None:
    """One response of the second prompt has no score, so that it says nothing of the best of two."""
    found = measures([[1.0, 0.0], [0.0]])
    assert found["eval/best@2"] == found["eval/pass@2"] == 1.0
    assert "eval/best@2_se" not in found
    assert found["eval/best@1"] == 0.25, "of the best of one it says its score"


def test_one_response_per_prompt_has_an_error_and_no_other_measure() -> None:
    assert measures([[1.0], [0.0]], [["a"], ["b"]]) == {"eval/score_se": 0.5}
    assert measures([[1.0]]) == {}
    assert measures([]) == {}
