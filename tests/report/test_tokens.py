"""The tokens of a report: which are shown, their numbers, and data that is not as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.report.page import page
from megarl.report.tokens import quantities, tokens
from tests.report.made_up import made_up, trace
from tests.report.parsed import parse
from tests.report.test_page import HOSTILE, check_references


def test_a_shift_is_the_log_prob_after_training_less_the_one_before() -> None:
    found = {
        one.name: list(one.values) for one in quantities(trace(old=[-1.0, -2.0], new=[-0.5, -4.0], ref=[-1.5, -2.0]))
    }
    assert found["log-prob shift of this phase"] == [0.5, -2.0]
    assert found["log-prob shift from the reference"] == [0.5, 0.0]
    assert found["log-prob before"] == [-1.0, -2.0]


def test_numbers_that_are_missing_or_not_finite_are_shown_as_missing() -> None:
    broken = trace(old=[-1.0, None], new=[float("nan"), -4.0])
    found = {one.name: list(one.values) for one in quantities({**broken, "advantages": [True, "1"], "values": {}})}
    assert found["log-prob before"] == [-1.0, None]
    assert found["log-prob after"] == [None, -4.0]
    assert found.keys() == {"log-prob before", "log-prob after"}


def test_the_first_and_the_last_phase_are_shown_with_a_table_of_every_number() -> None:
    run = made_up(traces=[{"phase": phase, **trace(score=phase / 10)} for phase in (1, 5, 20)])
    tree = parse(tokens(run, 3))
    assert [element.text() for element in tree.all("h3")] == ["Phase 1", "Phase 20"]
    assert [element.text() for element in tree.all("h4")] == ["Response 1, score 0.1", "Response 1, score 2"]
    assert [span.text() for span in tree.with_class("tokens")[0].all("span")] == ["one ", "two"]
    row = [cell.text() for cell in tree.all("tr")[2].all("td")]
    assert row == ["-2", "-2", "-4"]


def test_a_phase_that_was_run_again_is_shown_as_it_was_the_last_time() -> None:
    again = [{"phase": 1, **trace(score=0.25)}, {"phase": 2, **trace()}, {"phase": 1, **trace(score=0.75)}]
    assert "score 0.75" in tokens(made_up(traces=again), 3)
    assert "score 0.25" not in tokens(made_up(traces=again), 3)


def test_a_phase_that_was_run_twice_in_a_row_is_shown_as_it_was_the_last_time() -> None:
    again = [{"phase": 1, **trace(score=score, index=index)} for score in (0.25, 0.75) for index in (0, 1)]
    text = tokens(made_up(traces=again), 3)
    assert text.count("score 0.75") == 2
    assert "score 0.25" not in text


def test_long_responses_and_many_phases_stay_a_small_page() -> None:
    long: dict[str, Any] = trace(count=512)
    traces = [{"phase": phase, **long} for phase in range(1, 1001) for _ in range(4)]
    text = page([made_up(1000, traces=traces)])
    assert len(text.encode()) < 1_200_000
    assert "The first 256 of 1024 tokens." in text


def test_what_is_no_trace_breaks_nothing_and_text_of_a_model_stays_text() -> None:
    hostile = {"phase": 1, "prompt": HOSTILE, "tokens": [HOSTILE, "\n\t", 3, None], "old_logprobs": [-1.0, -2.0]}
    others: list[dict[str, Any]] = [
        {"phase": 1},
        {"phase": 1, "tokens": "abc"},
        {"phase": 1, "tokens": []},
        {"phase": 1, "tokens": None, "score": 10**400},
        {"phase": 1, "tokens": 3},
        {"phase": 1, "tokens": ["a"], "old_logprobs": [1e308], "new_logprobs": [-1e308], "values": [10**400]},
        {},
    ]
    runs = [made_up(traces=[hostile, *others]), made_up(path=Path("other"), traces=[{"phase": 2, **trace()}])]
    text = page(runs)
    tree = parse(text)
    assert not tree.all("img")
    assert len(tree.all("script")) == text.count("<script")
    check_references(tree)
