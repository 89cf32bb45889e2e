"""A run that loses most of what it had gained is warned of once, with its best checkpoint, and summary.json says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarl.callbacks.collapse import Collapse
from megarl.callbacks.summary import Summary
from megarl.report.falls import PATIENCE, SCORE, Fall, standard_error
from tests.callbacks.tiny import Tiny, train

FELL = [0.63, 0.79, 0.86, 0.72, 0.93, 0.98, 0.06, 0.0, 0.0]  # graph 1011, seed 7
CAME_BACK = [0.49, 0.71, 0.87, 0.90, 0.07, 0.11, 0.23, 0.32, 0.36, 0.60, 0.93]
HELD = [0.63, 0.82, 0.85, 0.90, 0.89, 0.98, 0.97, 0.97, 0.99]


def follow(values: Sequence[float], noise: float = 0.05) -> Fall:
    fall = Fall()
    for step, value in enumerate(values, 1):
        fall.add(step, value, noise)
    return fall


def test_a_score_that_falls_and_stays_down_has_collapsed() -> None:
    fall = follow(FELL)
    assert fall.collapsed
    assert (fall.best, fall.best_step, fall.since) == (0.98, 6, 7)


def test_a_dip_is_no_collapse_and_one_may_end() -> None:
    assert not follow(CAME_BACK[: 4 + PATIENCE - 1]).collapsed
    assert follow(CAME_BACK[: 4 + PATIENCE]).collapsed
    assert not follow(CAME_BACK).collapsed


@pytest.mark.parametrize(
    "values",
    [
        HELD,
        [0.60, 0.62, 0.58, 0.61, 0.57, 0.58, 0.59],  # nothing was gained but noise
        [100.0, 101.0, 100.2, 100.1, 100.0, 100.0],
        [-5.0, -2.0, -2.5, -2.4, -3.0, -2.2],  # below 0, and half of the gain is still there
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ],
)
def test_ordinary_courses_are_none(values: list[float]) -> None:
    assert not follow(values, noise=0.1 * max(abs(values[0]), 1.0)).collapsed


@pytest.mark.parametrize(
    "values",
    [
        [0.90, 0.92, 0.1, 0.1, 0.1],  # little was gained, nearly all lost
        [-5.0, -1.0, -4.0, -4.5, -4.2],
        [90.0, 120.0, 91.0, 92.0, 90.0],
    ],
)
def test_losing_most_of_the_gain_or_of_the_best_is_one(values: list[float]) -> None:
    assert follow(values).collapsed


def run(folder: Path, evals: list[float], mode: str) -> dict[str, object]:
    metric = {"min": "eval/loss", "max": "eval/accuracy"}[mode]
    collapse = Collapse(metric, mode, lambda: Path("kept/step-0000002"))
    steps = len(evals)
    train(Tiny([1.0] * steps, evals=evals), [collapse, Summary(folder, collapse)], steps=steps, eval_every=1)
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.parametrize("mode", ["min", "max"])
def test_an_evaluated_metric_that_collapses_is_warned_of_once_and_is_in_the_summary(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses of 9, 1, 9 are accuracies of .1, .9, .1 here."""
    (fall,) = run(tmp_path, [9.0, 1.0, 9.0, 9.0, 9.0, 9.0], mode)["collapsed"]  # type: ignore[misc]
    best = {"min": 1.0, "max": 0.9}[mode]
    assert fall["best"] == pytest.approx(best)
    assert (fall["best_step"], fall["since_step"], fall["best_checkpoint"]) == (2, 3, "kept/step-0000002")
    said = [message for message in caplog.messages if "has collapsed" in message]
    assert len(said) == 1
    assert "the best checkpoint is kept/step-0000002" in said[0]
    assert "try a lower optim.lr" in said[0]


def test_a_run_that_holds_has_an_empty_list(tmp_path: Path) -> None:
    assert run(tmp_path, [9.0, 5.0, 4.0, 4.5, 3.0], "min")["collapsed"] == []


def test_a_fall_continues_over_a_checkpoint() -> None:
    before = Collapse("eval/loss", "min", lambda: None)
    before.falls["eval/loss"] = follow(FELL)
    after = Collapse("eval/loss", "min", lambda: None)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.falls == before.falls


@pytest.mark.parametrize(
    ("metric", "mode", "reward", "kept"),
    [
        ("eval/loss", "min", "a", {SCORE, "eval/loss"}),
        ("eval/accuracy", "max", "a", {SCORE}),
        ("eval/loss", "max", "a", {SCORE}),
        ("eval/loss", "min", "b", set()),
    ],
)
def test_readings_of_another_metric_mode_or_function_start_anew(
    metric: str, mode: str, reward: str, kept: set[str]
) -> None:
    before = Collapse("eval/loss", "min", lambda: None, lambda: {"reward.fn": "a"})
    before.falls = {SCORE: follow(FELL), "eval/loss": follow(FELL)}
    after = Collapse(metric, mode, lambda: None, lambda: {"reward.fn": reward})
    after.load_state_dict(before.state_dict())
    assert after.falls.keys() == kept


def test_the_standard_error_of_an_evaluation_is_noise_where_it_is_known() -> None:
    def collapsed(error: float) -> bool:
        fall = Fall()
        for step, value in enumerate([0.01, 0.04, 0.0, 0.0, 0.01]):
            fall.add(step, value, error=error)
        return fall.collapsed

    assert collapsed(0.0)
    assert not collapsed(0.02)


@pytest.mark.parametrize(
    ("value", "score", "error", "expected"),
    [(0.4, 0.4, 0.1, 0.1), (4.0, 0.4, 0.1, 1.0), (0.0, 0.0, 0.1, 0.1), (0.4, 0.05, 0.1, 0.0), (0.4, None, None, 0.0)],
)
def test_the_standard_error_of_another_metric_is_in_proportion_to_the_scores(
    value: float, score: float | None, error: float | None, expected: float
) -> None:
    assert standard_error(value, score, error) == pytest.approx(expected)
