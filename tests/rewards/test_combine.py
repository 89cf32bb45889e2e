"""Several functions as one: weights, per-token lists, and which of them had no score."""

import re
from typing import Any

import pytest

from megarl.errors import ConfigError, RewardError
from megarl.rewards import NoScore, RewardWorker, combine
from megarl.rewards.answers import AnswerError
from tests.refusals import refused


def ones(samples: list[str], **_: Any) -> list[float]:
    return [1.0] * len(samples)


def counted(outputs: list[str], **_: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


def per_token(outputs: list[str], **_: Any) -> list[list[float]]:
    return [[1.0] * len(output) for output in outputs]


def shorter_per_token(outputs: list[str], **_: Any) -> list[list[float]]:
    return [[1.0] * (len(output) - 1) for output in outputs]


def nan_for_x(outputs: list[str], **_: Any) -> list[float]:
    return [float("nan") if output == "x" else 2.0 for output in outputs]


def half(**_: Any) -> list[float]:
    return [0.5]


def call(combined: Any, *outputs: str, **metadata: Any) -> Any:
    columns = {"samples": list(outputs), "prompts": [""] * len(outputs), "outputs": list(outputs)}
    return combined.evaluate(**columns, tokenizer=None, **metadata)


def test_scores_are_weighted_and_each_functions_own_are_kept() -> None:
    values, parts = call(combine([ones, counted], [2.0, -0.5]), "ab", "abcd")
    assert values == [2.0 - 1.0, 2.0 - 2.0]
    assert parts == {"ones": [1.0, 1.0], "counted": [2.0, 4.0]}


def test_without_weights_each_counts_once_and_a_name_used_twice_is_numbered() -> None:
    values, parts = call(combine([counted, counted, ones]), "ab")
    assert values == [5.0]
    assert list(parts) == ["counted", "counted_2", "ones"]


@pytest.mark.parametrize("order", [[per_token, counted], [counted, per_token]])
def test_a_plain_score_lands_on_the_last_token_of_a_list(order: list[Any]) -> None:
    weights = [2.0 if function is per_token else 10.0 for function in order]
    values, parts = call(combine(order, weights), "abc")
    assert values == [[2.0, 2.0, 2.0 + 30.0]]
    assert parts == {"per_token": [3.0], "counted": [3.0]}


def test_per_token_lists_add_up_and_must_agree() -> None:
    assert call(combine([per_token, per_token], [1.0, 3.0]), "ab")[0] == [[4.0, 4.0]]
    (value,) = call(combine([per_token, shorter_per_token]), "abc")[0]
    assert isinstance(value, NoScore)
    assert re.findall(r"\d+", value.why) == ["3", "2"]


def test_a_sample_that_one_function_cannot_score_has_none_and_says_which() -> None:
    values, parts = call(combine([ones, nan_for_x], [1.0, 0.0]), "a", "x")
    assert values[0] == 1.0
    assert isinstance(values[1], NoScore)
    assert "(from nan_for_x)" in values[1].why
    assert parts == {"ones": [1.0, 1.0], "nan_for_x": [2.0, None]}


def test_a_wrong_count_names_the_function() -> None:
    with pytest.raises(AnswerError, match=r"returned 1 scores for 2 samples \(the part half\)"):
        call(combine([ones, half]), "a", "b")


def test_each_function_has_options_of_its_own() -> None:
    combined = combine(
        ["megarl.rewards.builtin:regex", "megarl.rewards.builtin:regex"],
        [1.0, 10.0],
        [{"pattern": "a"}, {"pattern": "b", "mode": "count"}],
    )
    assert call(combined, "abb", pattern=["of the record"])[0] == [21.0]


def test_it_runs_in_the_worker_and_parts_come_back_in_order() -> None:
    combined = combine([counted, "megarl.rewards.builtin:length"], [1.0, 0.5])
    with RewardWorker(combined, None, retries=0) as worker:
        scores = worker.score(["a", "bb", "ccc"], [""] * 3, ["a", "bb", "ccc"])
    assert scores.values == [1.5, 3.0, 4.5]
    assert scores.parts == {"counted": [1.0, 2.0, 3.0], "length": [1.0, 2.0, 3.0]}


def test_the_worker_reports_the_function_without_a_score() -> None:
    with (
        RewardWorker(combine([ones, nan_for_x]), None, retries=0) as worker,
        refused(RewardError, key="reward.fn", where="sample 1", names=("nan", "nan_for_x")),
    ):
        worker.score(["a", "x"], ["", ""], ["a", "x"])


def test_mistakes_are_refused_before_anything_runs() -> None:
    for arguments, key, value in (
        (([],), "reward.fn", []),
        (([ones], [1.0, 2.0]), "weights", [1.0, 2.0]),
        (([ones, ones], None, [{}]), "options", [{}]),
        (([ones], [float("inf")]), "weight", float("inf")),
        ((["nowhere.at_all:score"],), "reward.fn", "nowhere.at_all:score"),
    ):
        with refused(ConfigError, key=key, value=value, names=("reward.fn",)):
            combine(*arguments)  # type: ignore[arg-type]
