"""Which answers rejection-sampling fine-tuning keeps."""

import pytest

from megarl.modules.rft import drop_duplicates, rows_above_percentile
from megarl.rollout.requests import Rollout


def answer(prompt: int, tokens: list[int], sample: int = 0) -> Rollout:
    return Rollout(prompt, sample, [1], tokens, [0.0] * len(tokens), "eos")


def scored(*scores: tuple[int, float]) -> list[tuple[Rollout, float]]:
    return [(answer(prompt, [number]), score) for number, (prompt, score) in enumerate(scores)]


def test_repeated_answers_count_once() -> None:
    rollouts = [answer(0, [5, 6]), answer(0, [5, 6], 1), answer(1, [5, 6])]
    kept = drop_duplicates(rollouts, [1.0, 1.0, [0.25, 0.5]])
    assert [(rollout.prompt_id, rollout.sample_id, score) for rollout, score in kept] == [(0, 0, 1.0), (1, 0, 0.75)]


def test_the_best_of_each_prompt_are_kept_and_fewer_as_the_percentile_rises() -> None:
    answers = scored((0, 0.0), (0, 1.0), (0, 2.0), (0, 3.0), (1, 10.0), (1, 20.0))
    assert rows_above_percentile(answers, 0.5) == [2, 3, 5]
    assert rows_above_percentile(answers, 1.0) == [3, 5]


def test_prompts_whose_answers_score_alike_are_kept_where_that_is_no_less_than_the_mean() -> None:
    answers = scored((0, 1.0), (0, 1.0), (1, 0.0), (1, 0.0), (2, 0.0), (2, 1.0))
    assert rows_above_percentile(answers, 0.9) == [0, 1, 5]


def test_the_worst_answers_are_left_out_also_where_most_are_no_better() -> None:
    answers = scored(*[(0, 0.0)] * 20, (0, 0.5), *[(1, 0.0)] * 20, (1, 0.25))
    assert rows_above_percentile(answers, 0.7) == [20, 41]


@pytest.mark.parametrize("percentile", [0.0, 0.7, 1.0])
def test_answers_that_all_score_alike_are_all_kept(percentile: float) -> None:
    assert rows_above_percentile(scored((0, 0.1), (1, 0.1), (1, 0.1)), percentile) == [0, 1, 2]
