"""The tables of benchmarks/dpo.py come out, with a stand-in for TRL's side and sizes that mean nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dpo
from megarl.parallel.cpu import needed

pytestmark = pytest.mark.skipif(not needed(), reason="the table is made on machines without a GPU")
TINY = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40, "prompt": 3, "longest": 12, "pairs": 4, "steps": 2}


@pytest.mark.gate
def test_a_run_of_ours_times_every_step(tmp_path: Path) -> None:
    job = dpo.write_job(dpo.Sizes(**TINY), tmp_path)
    found = dpo.measured([dpo.sys.executable, "-m", "benchmarks.dpo", "--one", "cached", str(job)])
    assert len(found["losses"]) == 4
    assert len(found["cpu"]) == 3
    assert min(found["cpu"]) > 0
    assert found["once"] > 0
    assert found["losses"][0] == pytest.approx(0.6931, rel=1e-3)  # the policy is still its reference


@pytest.mark.parametrize(("least", "code"), [(("1.5", "0.9"), 0), (("2.5", "0.9"), 1)])
def test_the_table_has_rates_beside_trl(
    least: Sequence[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(command: Sequence[str]) -> dict[str, Any]:
        ours, cached = "--one" in command, "cached" in command
        seconds = 1.0 if ours and cached else 2.0
        found = {"cpu": [9.0, seconds, seconds], "once": 1.6 if cached else 0.0, "losses": [0.7, 0.6, 0.5, 0.4]}
        return found if ours else {**found, "versions": "stand-in 1.0"}

    monkeypatch.setattr(dpo, "measured", measured)
    arguments = ["--trl", "python", "--rounds", "2", "--steps", "2", "--sizes", json.dumps(TINY), "--least", *least]
    assert dpo.main(arguments) == code
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert "beside stand-in 1.0" in lines
    assert rows[2:6] == [
        ["megarl", "cached", "4.00", "2.00", "100"],
        ["TRL", "cached", "2.00", "1.00", "100"],
        ["megarl", "resident", "2.00", "1.00", ""],
        ["TRL", "resident", "2.00", "1.00", ""],
    ]
    assert rows[6] == dpo.PADDING_HEADER


def test_runs_with_other_losses_are_not_compared() -> None:
    dpo.check_same_losses(("TRL", "cached"), [0.5, 0.4001], [0.5, 0.4])
    with pytest.raises(AssertionError, match="TRL cached"):
        dpo.check_same_losses(("TRL", "cached"), [0.5, 0.41], [0.5, 0.4])
