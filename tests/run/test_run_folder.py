import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import megarl
from megarl.config.sft import SFTConfig
from megarl.errors import ConfigError
from megarl.parallel.device import CPU
from megarl.run import run_folder
from megarl.run.run_folder import RunFolder, resolve_run_dir, versions
from tests.refusals import refused

RESOLVED = {
    "seed": 1,
    "optim": {"lr": 1e-05},
    "trainer": {"max_time": "02:00:00", "eval_every": None},
    "data": {"train": ["a"]},
}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one commit that megarl seems to be run from."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("old\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    monkeypatch.setattr(megarl, "__file__", str(folder / "code.py"))
    return folder


def state(folder: Path) -> dict:
    return json.loads((folder / "git.json").read_text())


def test_config_reads_back_as_it_was(tmp_path):
    path = RunFolder(tmp_path / "a" / "b").write_config(RESOLVED)
    assert path == tmp_path / "a" / "b" / "config.yaml"
    assert OmegaConf.to_container(OmegaConf.load(path)) == RESOLVED


def test_earlier_config_is_kept_when_it_differs(tmp_path):
    for lr in (1.0, 1.0, 2.0, 3.0):
        RunFolder(tmp_path).write_config({"lr": lr})
    kept = {path.name: OmegaConf.load(path).lr for path in tmp_path.iterdir()}
    assert kept == {"config.1.yaml": 1.0, "config.2.yaml": 2.0, "config.yaml": 3.0}


def test_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(ConfigError, key="run.dir", where="file/run"):
        RunFolder(tmp_path / "file" / "run")


def test_versions_name_the_software_and_the_machine(tmp_path):
    RunFolder(tmp_path).write_environment()
    written = json.loads((tmp_path / "versions.json").read_text())
    assert written["megarl"] == megarl.__version__
    assert written["python"] == ".".join(map(str, sys.version_info[:3]))
    assert written["cpu"]["count"] == os.cpu_count()
    assert written["device_settings"].keys() == asdict(CPU).keys()
    for package in ("torch", "megatron-core", "lightning", "hydra-core", "transformers"):
        assert re.match(r"\d+\.\d+", written[package]), package


def test_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(run_folder, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] is None


def test_clean_checkout(checkout, tmp_path):
    RunFolder(tmp_path / "run").write_environment()
    written = state(tmp_path / "run")
    assert written["commit"] == git(checkout, "rev-parse", "HEAD")
    assert written["dirty"] is False
    assert not (tmp_path / "run" / "git.diff").exists()


def test_changed_checkout_stores_the_difference(checkout, tmp_path):
    (checkout / "code.py").write_text("new\n")
    (checkout / "notes.txt").write_text("")
    RunFolder(tmp_path / "run").write_environment()
    written = state(tmp_path / "run")
    assert (written["dirty"], written["changed"], written["untracked"]) == (True, ["code.py"], ["notes.txt"])
    difference = (tmp_path / "run" / "git.diff").read_text()
    assert "-old\n+new\n" in difference
    git(checkout, "checkout", "-q", "code.py")
    (tmp_path / "patch").write_text(difference)
    git(checkout, "apply", str(tmp_path / "patch"))
    assert (checkout / "code.py").read_text() == "new\n"


def test_difference_of_an_earlier_process_is_not_left_as_if_it_were_this_ones(checkout, tmp_path):
    (checkout / "code.py").write_text("new\n")
    RunFolder(tmp_path / "run").write_environment()
    git(checkout, "checkout", "-q", "code.py")
    RunFolder(tmp_path / "run").write_environment()
    assert not (tmp_path / "run" / "git.diff").exists()
    assert (tmp_path / "run" / "git.1.diff").exists()


def test_checkout_without_a_commit(checkout, tmp_path):
    shutil.rmtree(checkout / ".git")
    git(checkout, "init", "-q")
    RunFolder(tmp_path / "run").write_environment()
    assert state(tmp_path / "run")["commit"] is None


def test_no_checkout_and_no_git_are_no_error(checkout, tmp_path, monkeypatch):
    shutil.rmtree(checkout / ".git")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    RunFolder(tmp_path / "one").write_environment()
    assert "not a git repository" in state(tmp_path / "one")["reason"]
    monkeypatch.setenv("PATH", str(tmp_path))
    RunFolder(tmp_path / "two").write_environment()
    assert state(tmp_path / "two")["reason"] == "git is not installed"


def named(**run: str) -> SFTConfig:
    config = SFTConfig()
    for key, value in run.items():
        setattr(config.run, key, value)
    return config


def test_run_dir_wins_over_name():
    assert resolve_run_dir("sft", named(dir="/somewhere/x", name="y"), {}) == Path("/somewhere/x")
    assert resolve_run_dir("sft", named(name="y"), {}) == Path("runs/y")


def test_made_up_name_is_entry_and_time_and_never_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    first, second = (resolve_run_dir("sft", named(), {}) for _ in range(2))
    assert re.fullmatch(r"runs/sft-20231\d{3}-\d{6}", str(first))
    assert second == Path(f"{first}-2")


def test_processes_of_one_torchrun_agree(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
    first = resolve_run_dir("sft", named(), started)
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    assert resolve_run_dir("sft", named(), started) == first
    assert not first.exists()


def test_several_machines_without_a_common_name_are_refused():
    with refused(ConfigError, key="run.name"):
        resolve_run_dir("sft", named(), {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "2"})


def test_slurm_tasks_agree_and_a_requeued_job_finds_its_folder():
    environ = {"SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train"}
    assert resolve_run_dir("sft", named(), environ) == Path("runs/sft-job42-0")
