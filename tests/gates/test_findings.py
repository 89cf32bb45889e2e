"""The recorded runs of tests/report/real, made again: good ones have no finding, bad ones those that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.report.data import RunData, read_run
from megarl.report.findings import FILE, find
from tests.report.keep import make, read_index

INDEX = read_index()


@pytest.mark.gate
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", INDEX)
def test_a_recorded_run_made_again_has_the_findings_that_it_was_recorded_for(name: str, tmp_path: Path) -> None:
    said = make(INDEX[name]["command"], tmp_path / "run")
    found = [one["name"] for one in json.loads((tmp_path / "run" / FILE).read_text())["findings"]]
    print(f"{name}: {found}")  # noqa: T201
    if INDEX[name]["findings"]:
        assert set(INDEX[name]["findings"]) <= set(found)
    else:
        assert found == []
        assert _problems_on_its_way(read_run(tmp_path / "run")) == []
    assert all(f" {one}: " in said for one in found), said[-3000:]


def _problems_on_its_way(data: RunData) -> list[str]:
    """The problems that `health.stop_on` could have ended the run for."""
    parts = [RunData(data.path, data.config, data.rows[:length]) for length in range(1, len(data.rows))]
    return [one.name for part in parts for one in find(part) if one.severity == "problem"]
