"""`megarl compare`: sides, revisions in worktrees, the verdict and its exit code; and once with runs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megarl.compare import DIFFERENT, compare, read
from megarl.errors import ConfigError, DataError
from megarl.trials.sides import read_side
from tests.e2e.runs import SMALL
from tests.refusals import refused
from tests.report.parsed import parse
from tests.test_sweep import FakeJobs, WorldJobs
from tests.worlds import Worlds

METRIC = "compare.metric=eval/loss"


def by_lr(settings: dict[str, str]) -> float:
    """A loss that depends on the learning rate and, as much, on the seed."""
    return float(settings.get("optim.lr", 0.5)) + float(settings["seed"])


def compared(folder: Path, a: str, b: str, *words: str, jobs: FakeJobs | None = None) -> tuple[int, dict[str, Any]]:
    argv = ["sft", a, b, METRIC, f"compare.dir={folder}", *words]
    code = compare(argv, jobs or FakeJobs(by_lr))
    return code, json.loads((folder / "differences.json").read_text())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_settings_that_differ_are_found_on_the_same_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = FakeJobs(by_lr)
    code, found = compared(tmp_path / "c", "optim.lr=0.1", "optim.lr=0.3 optim.eps=1e-6", "--fail", jobs=jobs)
    assert code == DIFFERENT
    assert found["eval/loss"]["mean"] == pytest.approx(0.2)
    assert [one["seed"] for one in jobs.started] == ["1", "1", "2", "2", "3", "3"]
    assert {one.get("optim.eps") for one in jobs.started} == {None, "1e-6"}
    shown = capsys.readouterr().out
    assert "differs" in shown
    assert "paired over 3 seeds; 95% interval: Student's t" in shown


def test_the_differences_are_drawn_beside_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    _, found = compared(folder, "optim.lr=0.1", "optim.lr=0.3", "compare.seeds=2")
    assert found["eval/loss"]["values_b"] == pytest.approx([1.3, 2.3])
    tree = parse((folder / "differences.html").read_text())
    assert [heading.text() for heading in tree.all("h1")] == ["optim.lr=0.1 and optim.lr=0.3 compared"]
    assert "seed 2: A 2.1, B 2.3." in tree.all(id="difference-eval-loss")[0].text()
    assert f"page: {folder / 'differences.html'}" in capsys.readouterr().err
    compared(folder, "optim.lr=0.1", "optim.lr=0.5", "compare.seeds=2")  # replaces the page
    assert "optim.lr=0.5" in (folder / "differences.html").read_text()


def test_a_page_of_someone_else_is_refused_before_a_run_starts(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "differences.html").write_text("my notes")
    jobs = FakeJobs(by_lr)
    with refused(ConfigError, key="compare.dir"):
        compared(tmp_path / "c", "optim.lr=0.1", "optim.lr=0.3", jobs=jobs)
    assert not jobs.started
    assert (tmp_path / "c" / "differences.html").read_text() == "my notes"


def test_equal_settings_are_equal_with_fail_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compared(tmp_path / "c", "optim.lr=0.1", "optim.lr=0.1", "--fail", "compare.seeds=2")
    assert (code, found["eval/loss"]["equal"], found["eval/loss"]["differs"]) == (0, True, False)
    assert "equal" in capsys.readouterr().out


def test_without_fail_a_difference_is_no_error(tmp_path: Path) -> None:
    assert compared(tmp_path / "c", "optim.lr=0.1", "optim.lr=0.2")[0] == 0


def test_finished_runs_are_not_repeated_in_a_folder_that_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        compared(folder, "optim.lr=0.1", "optim.lr=0.2", jobs=FakeJobs(by_lr, most=3))
    jobs = FakeJobs(by_lr)
    compared(folder, "optim.lr=0.1", "optim.lr=0.2", jobs=jobs)
    assert len(jobs.started) == 3


def test_a_run_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    with refused(DataError, key="optim.lr=0.1", names=("exit 3",)):
        compared(tmp_path / "c", "optim.lr=0.1", "optim.lr=0.2", jobs=FakeJobs(lambda settings: 3))


def test_sides_are_settings_files_and_presets(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optim: {lr: 1.0e-3}\ndata.train: [a.jsonl]\n")
    assert read_side("+conf=randomwalks optim.lr=1").words == ("+conf=randomwalks", "optim.lr=1")
    assert read_side("mine.yaml").words == ("optim.lr=0.001", "data.train=[a.jsonl]")
    assert read_side("randomwalks").words == ("+conf=randomwalks",)
    assert read_side(".").words == ()


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        ([], "ALGORITHM"),
        (["sft", "optim.lr=1", METRIC], "compare"),
        (["sft", "optim.lr=1", "optim.lr=2"], "compare.metric"),
        (["sft", "nothing", ".", METRIC], "nothing"),
        (["sft", "optim.rl=1", ".", METRIC], "optim.rl"),
        (["sft", "seed=1", "seed=2", METRIC], "seed"),
        (["sft", ".", "optim.lr=1", "run.dir=a", METRIC], "run.dir"),
        (["sft", "missing/a.yaml", ".", METRIC], "missing/a.yaml"),
        (["sft", "optim.lr='1", ".", METRIC], "optim.lr='1"),
        (["sft", ".", "optim.lr=1", METRIC, "compare.seeds=0"], "compare.seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_key(argv: list[str], key: str) -> None:
    with refused(ConfigError, key=key):
        read(argv)


PROGRAM = """
import json, sys
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(settings["run.dir"]); run.mkdir(parents=True, exist_ok=True)
values = {{"eval/loss": {loss} + float(settings["seed"]), "eval/other": 1.0}}
(run / "summary.json").write_text(json.dumps({{"metrics": {{name: {{"last": one}} for name, one in values.items()}}}}))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose program measures another loss in each of two commits, and a third one in the working tree."""
    folder = tmp_path / "repository"
    (folder / "megarl").mkdir(parents=True)
    (folder / "megarl" / "__init__.py").write_text("")
    monkeypatch.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for loss in (1.0, 2.0, 3.0):
        (folder / "megarl" / "train_sft.py").write_text(PROGRAM.format(loss=loss))
        if loss < 3:
            subprocess.run(["git", "add", "."], check=True)
            subprocess.run(["git", *who, "commit", "-qm", f"loss {loss}"], check=True)
    return folder


@pytest.mark.parametrize(
    ("a", "b", "values"), [("HEAD", "HEAD", (2.0, 2.0)), ("HEAD~1", "HEAD", (1.0, 2.0)), ("HEAD", "HEAD~1", (2.0, 1.0))]
)
def test_revisions_run_their_own_code(
    a: str, b: str, values: tuple[float, float], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = compare(["sft", a, b, METRIC, "compare.seeds=2", "compare.all=true", "compare.dir=out", "--fail"])
    assert code == (0 if a == b else DIFFERENT)
    found = json.loads((repository / "out" / "differences.json").read_text())
    assert (found["eval/loss"]["a"], found["eval/loss"]["b"]) == (1.5 + values[0], 1.5 + values[1])
    assert found["eval/other"]["equal"]
    trees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(trees.splitlines()) == 1  # the temporary ones are gone
    assert (repository / "megarl" / "train_sft.py").read_text() == PROGRAM.format(loss=3.0)


def test_a_name_of_a_preset_and_a_branch_is_refused(repository: Path) -> None:
    subprocess.run(["git", "branch", "randomwalks"], check=True)
    with refused(ConfigError, key="randomwalks"):
        read_side("randomwalks")


def test_runs_of_the_same_settings_are_bit_equal_and_others_are_not(worlds: Worlds, tmp_path: Path) -> None:
    small = [*SMALL, "model.num_layers=1", "model.hidden_size=32", "trainer.max_steps=2", "compare.seeds=1"]
    argv = ["sft", "optim.lr=1e-3", "optim.lr=1e-3", "compare.metric=train/loss", *small]
    compare([*argv, f"compare.dir={tmp_path}/same"], WorldJobs(worlds))
    assert json.loads((tmp_path / "same" / "differences.json").read_text())["train/loss"]["equal"]
    argv[2] = "optim.lr=3e-2"
    compare([*argv, f"compare.dir={tmp_path}/other"], WorldJobs(worlds))
    assert not json.loads((tmp_path / "other" / "differences.json").read_text())["train/loss"]["equal"]
