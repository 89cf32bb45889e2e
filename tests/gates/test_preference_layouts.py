"""Every preference algorithm has the same course in every layout, virtual stages included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import run_preference
from tests.e2e.test_train_preference import assert_same_course, cache, data, settings
from tests.worlds import Worlds

__all__ = ["cache", "data"]  # fixtures
pytestmark = [pytest.mark.gate, pytest.mark.timeout(1800)]
LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "PP2xVPP2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "DP2": (2, []),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
}


@pytest.mark.parametrize("entry", ["dpo", "kto", "orpo", "cpo"])
def test_the_course_is_the_same_in_every_layout(
    entry: str, worlds: Worlds, data: Path, cache: Path, tmp_path: Path
) -> None:
    own = [*settings(entry, cache), "model.num_layers=4"]
    worlds.run(1, run_preference, tmp_path / "one", entry, data, *own)
    for name, (world, overrides) in LAYOUTS.items():
        worlds.run(world, run_preference, tmp_path / name, entry, data, *own, *overrides)
        assert_same_course(tmp_path / name, tmp_path / "one")
