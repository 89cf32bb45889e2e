"""The chart of a metric at the end of a demo, and what has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megarl.errors import ConfigError, DataError
from megarl.run.curve import chart, read_metric
from tests.refusals import refused


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The metrics of a run whose steps are not all evaluated."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,eval/score,train/loss\n0,0.25,\n1,,2.0\n2,nan,1.5\n3,0.75,1.0\n")
    return path


def test_a_metric_is_read_where_it_was_measured(table: Path) -> None:
    assert read_metric(table, "eval/score") == [(0, 0.25), (3, 0.75)]


def test_a_rising_metric_is_drawn_from_the_lowest_to_the_highest_row() -> None:
    lines = chart([(step, step / 7) for step in range(8)]).splitlines()
    assert lines[0] == "       1 |       *"
    assert lines[-2] == "       0 |*......."
    assert lines[-1] == "step 0: 0   step 7: 1"


def test_a_long_run_fits_the_width_and_a_constant_is_a_line() -> None:
    lines = chart([(step, 0.5) for step in range(1000)]).splitlines()
    assert lines[-2] == f"     0.5 |{'*' * 60}"
    assert "*" not in "".join(lines[:-2])


def test_a_metric_or_a_run_that_is_not_there_is_refused(table: Path, tmp_path: Path) -> None:
    with refused(ConfigError, key="METRIC", value="eval/scor", offers={"METRIC": ["eval/score"]}):
        read_metric(table, "eval/scor")
    table.write_text("step,eval/score\n")
    with refused(DataError, where="metrics.csv"):
        read_metric(table, "eval/score")
    with refused(DataError, where="none/metrics.csv"):
        read_metric(tmp_path / "none" / "metrics.csv", "eval/score")


def test_the_chart_ends_with_the_path_of_all_metrics(table: Path) -> None:
    command = [sys.executable, "-m", "megarl.run.curve", str(table.parent), "eval/score"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"all metrics: {table}"
