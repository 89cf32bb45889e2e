"""`megarl selftest html=FILE`: what is drawn, and files that are not overwritten."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megarl.errors import ConfigError
from megarl.selftest import Settings, compare, draw, parse, report
from tests.refusals import refused
from tests.report.parsed import parse as tree_of

ALONE = {"loss": [4.0, 3.0], "grad_norm": [1.0, 2.0], "logprobs": [0.0, -1.0, -2.0]}
CLOSE = {"loss": [4.0, 3.00001], "grad_norm": [1.0, 2.0], "logprobs": [0.0, -1.0, -2.00001]}
FAR = {**CLOSE, "grad_norm": [1.0, 2.1]}


@pytest.mark.parametrize("layout", [CLOSE, FAR], ids=["same", "different"])
def test_the_page_has_the_verdict_of_the_table(layout: dict[str, list[float]], tmp_path: Path) -> None:
    file = tmp_path / "selftest.html"
    draw(Settings(tp=2, html=str(file)), ALONE, layout)
    tree = tree_of(file.read_text())
    rows, agree = compare(ALONE, layout, "fp32")
    verdicts = [row.children[-1].text() for row in tree.all(id="differences")[0].all("tbody")[0].all("tr")]
    assert verdicts == [row[-1] for row in rows if row[-1]]
    assert ("DIFFERENT" in tree.all("header")[0].text()) is not agree
    tolerance = tree.all("figure")[0].all("tbody")[0].all("tr")[1].children[-1].text()
    assert float(tolerance) == pytest.approx(1e-5 * 3.0 + 1e-6, rel=0.05)
    assert "tp2 pp1 cp1 dp1" in tree.all("h1")[0].text()
    assert f"megatron-core {version('megatron-core')}" in tree.all("body")[0].text()


def test_the_report_names_the_engine_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    report(Settings(), [], True)
    assert f"megatron-core {version('megatron-core')}, torch {torch.__version__}" in capsys.readouterr().out


def test_sequences_are_split_over_processes_of_their_own() -> None:
    assert parse(["cp=2", "tp=2"]).world == 4
    assert parse(["cp=2", "tp=2"]).alone().world == 1


def test_without_a_file_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Settings(), ALONE, CLOSE)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_page_of_a_self_test_is_refused_before_training(tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    for name in (str(mine), str(tmp_path), "", f"{mine}/a.html"):
        with refused(ConfigError, key="html"):
            parse(["tp=2", f"html={name}"])
    assert mine.read_text() == "my notes"
    draw(Settings(html=str(tmp_path / "a.html")), ALONE, CLOSE)
    assert parse([f"html={tmp_path / 'a.html'}"]).html.endswith("a.html")  # its own page is replaced
