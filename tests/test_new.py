"""`megarl new`: what a new project has, that its own `make test` passes, and what ends without leaving a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib

import megarl
from megarl import new
from megarl.config.compose import compose
from megarl.config.resources import launchers_folder
from tests.refusals import assert_command_refused, refused

ROOT = Path(megarl.__file__).parents[1]
INHERITED = ("MAKE", "MFLAGS", "PYTHON", "SLURM", "MEGARL", "RANK", "LOCAL", "WORLD", "MASTER")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A project whose name has a space, as the current folder."""
    monkeypatch.chdir(tmp_path)
    assert new.run(["my project"]) == 0
    assert "cd 'my project' && make test" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "my project")
    return tmp_path / "my project"


def make(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    return subprocess.run(
        ["make", *words],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_new_project_passes_its_own_tests(project: Path) -> None:
    done = make(project, "test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ran 3 tests" in done.stderr
    assert "layout: 1 processes" in done.stderr  # the launcher composed the preset
    assert f'"{sys.executable}" -m unittest' in done.stdout
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("file", "text", "instead", "named"),
    [
        ("rewards.py", "len(output)", "1", "test_half_of_the_letters_scores_a_half"),
        ("conf/mine.yaml", "inner_epochs", "inner_epoch", "ppo.inner_epoch"),
        ("conf/mine.yaml", "rewards.py:score", "rewards.py:scor", "did you mean score"),
    ],
)
def test_make_test_finds_what_is_broken(project: Path, file: str, text: str, instead: str, named: str) -> None:
    path = project / file
    path.write_text(path.read_text().replace(f" {text}", f" {instead}"))
    done = make(project, "test")
    assert done.returncode != 0
    assert named in done.stderr


def test_another_interpreter_can_be_chosen_and_a_lost_one_is_not_asked_for(project: Path) -> None:
    assert '"/other/python" -m unittest' in make(project, "--dry-run", "test", "PYTHON=/other/python").stdout
    (project / new.PYTHON_FILE).write_text("/lost/python\n")
    assert '"python3" -m unittest' in make(project, "--dry-run", "test").stdout
    assert new.PYTHON_FILE in (project / ".gitignore").read_text().splitlines()


def test_the_preset_trains_with_the_function_and_the_prompts_of_the_project(project: Path) -> None:
    config, _ = compose("ppo", ["+conf=mine"])
    assert (config.reward.fn, config.data.train) == ("rewards.py:score", ["prompts.jsonl"])
    assert (project / "README.md").read_text().startswith("# my project\n")
    assert os.access(project / "launch.sh", os.X_OK)


def test_the_launcher_runs_megarls_launcher_with_the_preset(project: Path) -> None:
    python = project / "python"  # composes nothing: another test does
    python.write_text(f'#!/bin/sh\ncase "$2" in *launchers_folder*) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    environ = {"MEGARL_DRY_RUN": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    environ |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "MEGARL_PYTHON": str(python)}
    lines = ["bash", "launch.sh", "seed=3"]
    done = subprocess.run(lines, cwd=project, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith("srun --nodes=2 --ntasks=16 ")
    assert command.endswith("-m megarl.train_ppo run.name=ppo-job7 +conf=mine seed=3")
    elsewhere = subprocess.run(["bash", project / "launch.sh"], cwd="/", env=environ, capture_output=True, text=True)
    assert_command_refused(elsewhere, "conf/mine.yaml")


def test_an_empty_folder_becomes_a_project_and_another_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new.run(["."]) == 0
    before = sorted(tmp_path.rglob("*"))
    with refused(new.ConfigError, key="FOLDER", value="."):
        new.run(["."])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_text

    def full(path: Path, text: str, **kwargs: Any) -> int:
        if path.name == "rewards.py":
            raise OSError(28, "No space left on device")
        return written(path, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    for folder in (tmp_path / "project", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with refused(new.ConfigError, key="FOLDER", value=str(folder)):
            new.run([str(folder)])
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_the_wheel_has_the_templates_and_the_launchers() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert new.PROJECT.is_relative_to(ROOT / wheel["packages"][0])
    assert wheel["force-include"]["launchers"] == "megarl/launchers"
    assert (launchers_folder() / "shared.sh").is_file()
    ignored = ["git", "check-ignore", *map(str, new.project_files().values())]  # these, a wheel leaves out
    assert subprocess.run(ignored, cwd=ROOT, capture_output=True, text=True).stdout == ""
