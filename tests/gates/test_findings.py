"""The recorded runs of tests/report/real, made again: good ones have no finding, bad ones those that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sweeps import COLLAPSED, settled
from megarl.report.data import RunData, read_run
from megarl.report.findings import FILE, find
from megarl.report.numbers import values
from tests.report.keep import make, read_index

INDEX = read_index()
NARROW_HEAD = "bad_narrow_value_head"
SEEDS = (3, 1, 4, 5, 6, 7, 8, 9)


@pytest.mark.gate
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(set(INDEX) - {NARROW_HEAD}))
def test_a_recorded_run_made_again_has_the_findings_that_it_was_recorded_for(name: str, tmp_path: Path) -> None:
    said = make(INDEX[name]["command"], tmp_path / "run")
    found = names_of(tmp_path / "run")
    print(f"{name}: {found}")  # noqa: T201
    if INDEX[name]["findings"]:
        assert set(INDEX[name]["findings"]) <= set(found)
    else:
        assert found == []
        assert problems_on_its_way(read_run(tmp_path / "run")) == []
    assert all(f" {one}: " in said for one in found), said[-3000:]


@pytest.mark.gate
@pytest.mark.timeout(3600)
def test_graph_1011_with_the_narrow_value_head_of_old_collapses_and_the_collapse_is_named(tmp_path: Path) -> None:
    """Which seeds collapse depends on rounding: few do. All start from one clone of the walks."""
    clone, run = INDEX[NARROW_HEAD]["command"].split(" && ")
    command = f"{clone} && {run}"
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        said = make(command.replace(f"seed={SEEDS[0]} ", f"seed={seed} "), folder)
        command = run.replace("CLONE", f"{tmp_path / str(SEEDS[0])}-clone")
        evaluated = values(read_run(folder).series("eval/optimality"))
        collapsed = settled(evaluated) < COLLAPSED * max(evaluated)
        print(f"seed {seed}: {settled(evaluated):.3f}, {names_of(folder)}")  # noqa: T201
        assert ("score_collapsed" in names_of(folder)) == collapsed
        if collapsed:
            assert "problem score_collapsed: " in said
            return
    pytest.fail(f"none of the seeds {SEEDS} collapsed: add more")


def names_of(folder: Path) -> list[str]:
    return [one["name"] for one in json.loads((folder / FILE).read_text())["findings"]]


def problems_on_its_way(data: RunData) -> list[str]:
    """The problems that `health.stop_on` could have ended the run for."""
    parts = [RunData(data.path, data.config, data.rows[:length]) for length in range(1, len(data.rows))]
    return [one.name for part in parts for one in find(part) if one.severity == "problem"]
