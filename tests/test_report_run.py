"""`megarl report`: the file that it writes, and what a wrong command is answered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl import cli
from megarl.completion import completed
from megarl.report.write import is_report
from tests.report.made_up import made_up, settings, write_run
from tests.report.parsed import parse
from tests.test_cli import imported

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two runs, a checkpoint, and files that are no runs."""
    write_run(tmp_path / "runs" / "one", made_up(5))
    write_run(tmp_path / "runs" / "two", made_up(4, config=settings(optim__lr=0.25)))
    (tmp_path / "runs" / "one" / "checkpoints" / "step-0000005").mkdir(parents=True)
    (tmp_path / "runs" / "early").mkdir()
    for name in ("config.yaml", "versions.json"):
        (tmp_path / "runs" / "early" / name).write_text("{}")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def report(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `megarl report WORDS`: (exit code, stdout, stderr)."""

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megarl"])
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *words])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return called


def test_the_report_of_a_run_is_written_into_its_folder_and_its_path_printed(report: Call, folder: Path) -> None:
    path = folder / "runs" / "one" / "report.html"
    assert report("runs/one") == (0, f"{path}\n", "")
    assert parse(path.read_text()).all("h1")[0].text() == "one"
    assert report("runs/one/") == (0, f"{path}\n", "")  # an earlier report is replaced
    assert not list(path.parent.glob(".report*"))


def test_several_runs_are_compared_in_the_current_folder_or_the_file_that_out_names(report: Call, folder: Path) -> None:
    assert report("runs/one", "runs/two") == (0, f"{folder / 'report.html'}\n", "")
    assert "optim.lr" in parse((folder / "report.html").read_text()).all(id="configuration")[0].text()
    assert report("runs/two", "out=a.html", "runs/one")[0] == 0
    assert is_report(folder / "a.html")
    assert report("--compare", "runs/two", "runs/one", "out=b.html") == (0, f"{folder / 'b.html'}\n", "")
    runs = [parse((folder / name).read_text()).all(id="configuration")[0].text() for name in ("a.html", "b.html")]
    assert runs[0] == runs[1]


WRONG = [
    ([], "RUN", "megarl report runs/demo"),
    (["runs/ona"], "RUN", "did you mean runs/one?"),
    (["nowhere/at/all"], "RUN", "runs/NAME"),
    (["empty"], "RUN", "no metrics.csv"),
    (["runs"], "RUN", "megarl report runs/one runs/two"),
    (["runs/early"], "RUN", "wait for its first metrics"),
    (["runs/one/metrics.csv"], "RUN", "name its folder, runs/one"),
    (["mine.html"], "RUN", "name the folder of a run"),
    (["runs/one/checkpoints/step-0000005"], "RUN", "is a checkpoint of a run: name the run, runs/one"),
    (["runs/one/checkpoints"], "RUN", "name the run, runs/one"),
    (["runs/one", "./runs/one"], "RUN", "is named twice"),
    (["runs/one", "out="], "out", "out=report.html"),
    (["runs/one", "out=mine.html"], "out", "is no report of megarl"),
    (["runs/one", "out=empty"], "out", "is a folder"),
    (["runs/one", "out=mine.html/a.html"], "out", "mine.html is a file"),
    (["runs/one", "output=a.html"], "output", "out=FILE"),
    (["run=runs/one"], "run", "write runs/one alone"),
    (["--out", "a.html", "runs/one"], "--out", "out=FILE"),
    (["--compare", "runs/one"], "--compare", "megarl report --compare runs/one OTHER_RUN"),
    (["--compare"], "RUN", "megarl report runs/demo"),
    (["--compares", "runs/one", "runs/two"], "--compares", "[--compare]"),
]


@pytest.mark.parametrize(("words", "key", "remedy"), WRONG, ids=[" ".join(words) or "nothing" for words, _, _ in WRONG])
def test_a_wrong_command_is_answered_in_one_line(
    report: Call, folder: Path, words: list[str], key: str, remedy: str
) -> None:
    code, out, err = report(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert key in err
    assert remedy in err
    assert (folder / "mine.html").read_text() == "<p>mine</p>"


def test_a_file_that_is_no_report_is_kept_even_under_the_reports_name(report: Call, folder: Path) -> None:
    path = folder / "runs" / "one" / "report.html"
    path.write_text("my notes")
    assert report("runs/one")[0] == 2
    assert path.read_text() == "my notes"


def test_a_report_is_made_without_torch_or_hydra(folder: Path) -> None:
    assert imported(["report", "runs/one"], folder) == (0, set())


def test_runs_are_completed(folder: Path) -> None:
    assert completed("megarl report ") == ["out=", "runs/one", "runs/two"]
    assert completed("megarl report runs/t") == ["runs/two"]
    assert completed("megarl report --") == ["--compare"]
    assert "report" in completed("megarl rep")
