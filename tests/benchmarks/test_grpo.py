"""The table of benchmarks/grpo.py comes out, with a stand-in for TRL's side and sizes that mean nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import grpo
from megarl.parallel.cpu import needed
from tests.e2e.runs import launched
from tests.worlds import Worlds

pytestmark = pytest.mark.skipif(not needed(), reason="the table is made on machines without a GPU")
TINY = {"layers": 1, "width": 16, "heads": 2, "prompt": 3, "longest": 6, "prompts": 4, "group": 2, "phases": 2}


def our_runs(folder: Path) -> list[dict[str, Any]]:
    """A run of ours with each kind of lengths."""
    sizes = grpo.Sizes(**TINY)
    grpo.write_model(folder, sizes)
    with launched():
        return [grpo.our_run(equal, str(folder), sizes, []) for equal in grpo.VARIANTS.values()]


@pytest.mark.gate
def test_a_run_of_ours_times_every_phase_but_the_first(worlds: Worlds, tmp_path: Path) -> None:
    ((falling, equal),) = worlds.run(1, our_runs, tmp_path)
    for found in (falling, equal):
        assert len(found["cpu"]) == len(found["tokens"]) == TINY["phases"]
        assert min(found["cpu"]) > 0
    assert equal["tokens"] == [TINY["longest"]] * TINY["phases"]
    assert max(falling["tokens"]) <= TINY["longest"]


@pytest.mark.parametrize(("least", "code"), [("4", 0), ("4.1", 1)])
def test_the_table_has_rates_beside_trl(
    least: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def our_run(equal: bool, model: str, sizes: grpo.Sizes, overrides: Sequence[str]) -> dict[str, Any]:
        return {"cpu": [2.0, 2.0] if equal else [0.5, 0.5], "tokens": [6.0, 6.0] if equal else [2.0, 4.0]}

    def their_run(python: str, equal: bool, model: str, sizes: grpo.Sizes) -> dict[str, Any]:
        return {"cpu": [2.0, 2.0], "tokens": [6.0, 6.0] if equal else [4.0, 4.0], "versions": "stand-in 1.0"}

    monkeypatch.setattr(grpo, "our_run", our_run)
    monkeypatch.setattr(grpo, "their_run", their_run)
    assert grpo.main(["--trl", "python", "--sizes", json.dumps(TINY), "--least", least]) == code
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert "beside stand-in 1.0" in lines
    assert rows[0] == grpo.HEADER
    assert rows[2:] == [  # 8 responses in each of two phases
        ["TRL", "as EOS falls", "4", "4.00", "16", ""],
        ["megarl", "as EOS falls", "3", "16.00", "48", "4.00"],
        ["TRL", "all equal", "6", "4.00", "24", ""],
        ["megarl", "all equal", "6", "4.00", "24", "1.00"],
    ]
