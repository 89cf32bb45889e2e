"""Sweeps count a run for the settings that decide its numbers, and say which runs collapsed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweeps import (
    NARROW,
    SWEEPS,
    TORCH,
    Case,
    initial_weights,
    known,
    learnable,
    read_series,
    settled,
    show,
    walks,
)
from tests.parallel.engines import small_engine
from tests.worlds import Worlds

CASE = walks(1011, 7)


def line(case: Case, values: list[float]) -> dict[str, Any]:
    return {**asdict(case), "fingerprint": case.fingerprint(), "series": {case.metric: values}}


def test_what_decides_numbers_is_in_a_runs_identity_and_nothing_else() -> None:
    same = [replace(CASE, settings=(*CASE.settings, setting)) for setting in ("run.dir=elsewhere", "debug=true")]
    other = [replace(CASE, settings=(*CASE.settings, "optim.lr=1e-4")), replace(CASE, head=NARROW), walks(1011, 8)]
    assert {case.fingerprint() for case in same} == {CASE.fingerprint()}
    assert CASE.fingerprint() not in {case.fingerprint() for case in other}


def test_runs_are_shown_by_what_they_have_in_common(tmp_path: Path) -> None:
    held, fell, missing = walks(1011, 1), walks(1011, 2), walks(1011, 3)
    results = tmp_path / "results.jsonl"
    lines = [line(held, [0.6, *[0.9] * 5]), line(fell, [0.6, 0.9, *[0.1] * 5])]
    results.write_text("".join(json.dumps(one) + "\n" for one in lines))
    (row,) = show([held, fell, missing], known(results)).splitlines()[2:]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["2", "1", "0.500", "0.100", "1"]


def test_a_series_is_a_column_of_the_table_of_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,eval/score,train/loss\n0,0.25,\n1,,2.0\n2,0.5,1.0\n")
    assert read_series(tmp_path / "metrics.csv", ["eval/score", "absent"]) == {"eval/score": [0.25, 0.5], "absent": []}
    assert settled([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 3.0


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_cases_that_compose(name: str) -> None:
    cases = list(SWEEPS[name]())
    assert len({case.fingerprint() for case in cases[:2]}) == 2


def test_a_graph_without_a_way_to_the_goal_is_not_learnable() -> None:
    assert learnable(1011)
    assert not learnable(1001)


def deviations(head: str) -> dict[str, float]:
    """The deviation of each weight of a value head that starts as a sweep wants it."""
    with initial_weights(head):
        engine = small_engine({}, value_head=True)
    return {name: float(w.std()) for name, w in engine.parameters() if name.startswith("value_head.") and w.ndim == 2}


def test_value_heads_start_as_a_sweep_wants_them(worlds: Worlds) -> None:
    (narrow,), (usual,) = (worlds.run(1, deviations, head) for head in (NARROW, TORCH))
    assert narrow == {
        "value_head.inner.weight": pytest.approx(0.02, rel=0.1),
        "value_head.outer.weight": 0,
    }
    assert all(usual[name] > max(0.03, 2 * narrow[name]) for name in narrow)
