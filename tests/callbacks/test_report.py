"""report.html of a run: written when it ends, and never the reason that it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback

from megarl.callbacks.report import Report
from megarl.callbacks.summary import Summary
from megarl.report.write import is_report
from megarl.run.csv_logger import MetricsFile
from tests.callbacks.tiny import Tiny, train
from tests.report.parsed import parse


def train_in(folder: Path, module: Tiny) -> None:
    callbacks: list[Callback] = [Summary(folder), Report(folder)]
    train(module, callbacks, steps=3, logger=[MetricsFile(folder / "metrics.csv")])


def test_a_run_that_ends_has_a_report_with_its_end(tmp_path: Path) -> None:
    train_in(tmp_path, Tiny([3.0, 2.0, 1.25]))
    tree = parse((tmp_path / "report.html").read_text())
    assert "finished, 3 of 3 steps" in tree.all("header")[0].text()
    assert "1.25" in tree.all(id="metric-train-loss")[0].with_class("last")[0].text()


def test_a_run_that_fails_has_a_report_with_its_error(tmp_path: Path) -> None:
    module = Tiny([3.0, 2.0, 1.0])

    def fail(step: int) -> None:
        if step == 2:
            raise ValueError("<b>broken</b>")

    module.in_step = fail
    with pytest.raises(ValueError, match="broken"):
        train_in(tmp_path, module)
    assert "ValueError: <b>broken</b>" in parse((tmp_path / "report.html").read_text()).all("header")[0].text()


def test_a_report_that_cannot_be_written_is_one_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report.html").write_text("my notes")
    with caplog.at_level("WARNING", logger="megarl"):
        train_in(tmp_path, Tiny([3.0, 2.0, 1.0]))
    assert [record.levelname for record in caplog.records if "report.html" in record.getMessage()] == ["WARNING"]
    assert (tmp_path / "report.html").read_text() == "my notes"


def test_whatever_breaks_in_a_report_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("megarl.callbacks.report.write_report", broken)
    with caplog.at_level("WARNING", logger="megarl"):
        train_in(tmp_path, Tiny([3.0, 2.0, 1.0]))
    assert [message for message in caplog.messages if "a bug" in message]
    assert not is_report(tmp_path / "report.html")


def test_a_run_without_a_table_of_metrics_has_no_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="megarl"):
        train(Tiny([3.0, 2.0]), [Summary(tmp_path), Report(tmp_path)], steps=2)
    assert not (tmp_path / "report.html").exists()
    assert not caplog.records
