"""Real runs, small ones on a CPU: good ones have no finding, and those that were made bad on purpose are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweeps import NARROW, RESULTS
from megarl.config.findings import FINDINGS
from megarl.report.data import RunData
from megarl.report.findings import find
from tests.report.keep import kept, read_index

INDEX = read_index()
GOOD = [name for name, told in INDEX.items() if not told["findings"]]
BAD = [name for name, told in INDEX.items() if told["findings"]]


def test_there_are_enough_good_runs_and_a_bad_one_for_every_finding() -> None:
    assert len(GOOD) >= 24
    assert {finding for name in BAD for finding in INDEX[name]["findings"]} == set(FINDINGS)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_has_no_finding_at_its_end(name: str) -> None:
    assert find(kept(name)) == []


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_is_never_ended_by_a_problem_on_its_way(name: str) -> None:
    data = kept(name)
    for length in range(1, len(data.rows)):
        so_far = RunData(data.path, data.config, data.rows[:length])
        assert [one.name for one in find(so_far) if one.severity == "problem"] == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run_has_the_findings_that_it_was_made_for(name: str) -> None:
    found = {one.name for one in find(kept(name))}
    assert set(INDEX[name]["findings"]) <= found


def swept(line: Mapping[str, Any]) -> RunData:
    """A run of benchmarks/results/sweeps.jsonl, which has the series of a few metrics."""
    metric, series = line["metric"], line["series"]
    phases = max((len(values) for name, values in series.items() if name != metric), default=0)
    every = max(1, round(phases / max(1, len(series[metric]) - 1)))
    rows: dict[int, dict[str, float]] = {}
    for name, values in series.items():
        for index, value in enumerate(values):
            step = index * every if name == metric else index + 1  # evaluations begin before the first phase
            rows.setdefault(step, {"step": step})[name] = value
    best = {"checkpoint": {"best": {"metric": metric, "mode": "max"}}}
    return RunData(Path("swept"), best, [rows[step] for step in sorted(rows)])


def test_of_all_swept_runs_only_the_collapses_of_graph_1011_with_narrow_value_heads_are_found() -> None:
    """Runs of ten algorithms on four tasks, in their default settings but for the value head's initial weights."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 200
    named = [(line, found) for line in lines if (found := find(swept(line)))]
    assert [found.name for _, (found,) in named] == ["score_collapsed"] * 2
    for line, (found,) in named:
        assert line["head"] == NARROW
        assert "data.options.seed=1011" in line["settings"]
        assert found.severity == "problem"
        assert found.steps is not None
        series = line["series"]["eval/optimality"]
        assert series[found.steps[0]] == max(series)
        assert series[found.steps[1]] <= 0.1 < series[found.steps[1] - 1]
