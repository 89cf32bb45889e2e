"""What a run's metrics show is logged and written at its end, however it ends, and may end it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from megarl.callbacks.findings import Findings, StopOnFinding
from megarl.callbacks.step_axis import StepAxis
from megarl.errors import FindingError
from megarl.run.csv_logger import MetricsFile
from tests.callbacks.tiny import SaveAt, Tiny, train
from tests.tiny_runs import run_tiny
from tests.worlds import Worlds

CONFIG = {"trainer": {"max_steps": 20}}
RISES = [1.0 + step for step in range(20)]
FALLS = [20.0 - step for step in range(20)]


def run(
    folder: Path,
    losses: Sequence[float],
    *more: Callback,
    steps: int = 20,
    stop_on: Sequence[str] = (),
    resume: Path | None = None,
    **settings: Any,
) -> Findings:
    findings = Findings(folder, CONFIG)
    stop = [StopOnFinding(stop_on, findings)] if stop_on else []
    logger = [MetricsFile(folder / "metrics.csv")]
    module = Tiny(losses, **settings)
    train(module, [StepAxis(), *stop, *more, findings], steps=steps, logger=logger, resume=resume)
    return findings


def stopped(run_dir: Path) -> tuple[str, int]:
    """The value of the error with which this rank ends a run whose evaluations collapse, and the rows that it had."""
    findings = Findings(run_dir, {"checkpoint": {"best": {"metric": "eval/loss", "mode": "max"}}})
    evals = dict(enumerate([0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1], 1))
    stop = StopOnFinding(["score_collapsed"], findings)
    try:
        run_tiny(run_dir, 6, evals=evals, eval_every=1, more_callbacks=lambda _: [StepAxis(), stop, findings])
    except FindingError as error:
        return error.value, len(findings.rows)
    return "", len(findings.rows)


def test_all_processes_end_together(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds.run(2, stopped, tmp_path) == [("score_collapsed", 5)] * 2
    assert written(tmp_path) == ["score_collapsed"]


def written(folder: Path) -> list[str]:
    content = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    return [finding["name"] for finding in content["findings"]]


def test_findings_are_logged_a_line_each_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, RISES)
    assert written(tmp_path) == ["loss_diverges"]
    (said,) = [record for record in caplog.records if "loss_diverges" in record.getMessage()]
    assert said.levelname == "WARNING"
    assert "\n" not in said.getMessage()
    assert "optim.lr" in said.getMessage()


def test_a_good_run_is_told_nothing_and_has_an_empty_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, FALLS)
    assert written(tmp_path) == []
    assert not [record for record in caplog.records if "megarl.callbacks.findings" in record.name]


@pytest.mark.parametrize("ending", [ValueError("broken"), KeyboardInterrupt()])
def test_a_run_that_fails_or_is_interrupted_has_its_findings(ending: BaseException, tmp_path: Path) -> None:
    class Ends(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                raise ending

    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        run(tmp_path, RISES, Ends())
    assert written(tmp_path) == ["loss_diverges"]


def test_a_named_finding_ends_the_run_at_its_step_and_that_step_is_not_saved(tmp_path: Path) -> None:
    saved = [SaveAt(step, tmp_path / f"step-{step}") for step in range(1, 21)]
    with pytest.raises(FindingError) as found:
        run(tmp_path, RISES, *saved, stop_on=["evaluation_gap", "loss_diverges"])
    assert found.value.exit_code == 3
    assert (found.value.key, found.value.value) == ("health.stop_on", "loss_diverges")
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        last = int(list(csv.DictReader(file))[-1]["step"])
    assert last == 10, "the row that shows it is logged"
    assert (tmp_path / "step-9").exists()
    assert not (tmp_path / "step-10").exists()
    assert written(tmp_path) == ["loss_diverges"]


def test_a_finding_that_is_not_named_does_not_end_the_run(tmp_path: Path) -> None:
    findings = run(tmp_path, RISES, stop_on=["evaluation_gap"])
    assert max(findings.rows) == 20


def test_a_resumed_run_continues_with_the_rows_up_to_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, RISES, SaveAt(6, tmp_path / "six"), steps=8)
    assert written(tmp_path) == []  # too few
    findings = run(tmp_path, RISES, steps=10, resume=tmp_path / "six")
    assert sorted(findings.rows) == list(range(1, 11))
    assert written(tmp_path) == ["loss_diverges"]


def test_a_file_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    class Ends(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            raise ValueError("broken")

    (tmp_path / "findings.json").mkdir()
    with pytest.raises(ValueError, match="broken"):
        run(tmp_path, RISES, Ends())


def test_findings_that_cannot_be_written_or_looked_for_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no space left on the device")

    monkeypatch.setattr("megarl.callbacks.findings.find", broken)
    with caplog.at_level("ERROR", logger="megarl"):
        run(tmp_path, FALLS, stop_on=["no_learning"])
    assert "findings.json could not be written: " in caplog.text
    assert "no space left on the device" in caplog.text
