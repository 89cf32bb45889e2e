"""The newest megatron-core that megarl runs on: its tests, and the same numbers as with this environment's."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from megarl.parallel.megatron_versions import NEWEST, OLDEST, installed
from tests.e2e.runs import SMALL, WALKS, assert_same_bits, final_tensors
from tests.fakes.runs import SIX, after_three_steps, course
from tests.gates.environments import ROOT, make_environment_of, resolved, run

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

FLOORS = {
    "layouts": ["tests/parallel", "tests/test_selftest.py"],
    "resume": ["tests/e2e/test_resume.py", "tests/e2e/test_written_before.py", "tests/test_checkpoint.py"],
    "exchange": ["tests/models"],
    "rollout": ["tests/rollout"],
}
OF_PYTHON = {"3.10": OLDEST, "3.11": OLDEST, "3.12": NEWEST, "3.13": NEWEST}
OF_TIME = "perf/"  # what differs from run to run
two_releases = pytest.mark.skipif(installed() == NEWEST, reason=f"this environment has megatron-core {NEWEST} itself")


def megarl(python: Path, program: str, *settings: str | Path) -> None:
    """Run a program of this checkout, which must succeed."""
    words = [str(setting) for setting in settings]
    run(python, "-m", f"megarl.{program}", *words, cwd=ROOT, timeout=1200, PYTHONPATH=str(ROOT))


def numbers(run_dir: Path) -> list[dict[str, str]]:
    """All that a run logged, as written, but what its clock and the machine's memory decide."""
    with (run_dir / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(OF_TIME)} for row in csv.DictReader(file)
        ]


def test_the_environment_has_the_newest_release(mcore_python: Path) -> None:
    said = run(mcore_python, "-m", "megarl.selftest", "steps=1", cwd=ROOT, timeout=600, PYTHONPATH=str(ROOT)).stdout
    assert f"engine: megatron-core {NEWEST}, torch" in said
    assert "the layout gives the same numbers" in said


@pytest.mark.parametrize(("version", "release"), OF_PYTHON.items())
def test_pip_takes_the_newest_release_that_the_python_can_have(version: str, release: str, tmp_path: Path) -> None:
    python = make_environment_of(version, tmp_path / "venv", {"torch": torch.__version__.partition("+")[0]})
    assert resolved(python, ROOT, without=["PIP_CONSTRAINT"])["megatron-core"] == release


@pytest.mark.parametrize("floor", FLOORS)
def test_the_tests_of_a_floor_pass_with_the_newest_release(floor: str, mcore_python: Path, tmp_path: Path) -> None:
    words = ["-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "runs", *FLOORS[floor]]
    done = run(mcore_python, *words, cwd=ROOT, timeout=3500, PYTHONPATH=str(ROOT))
    assert " passed" in done.stdout


@two_releases
@pytest.mark.parametrize("layout", [[], ["parallel.tp=2", "trainer.devices=2"]], ids=["one", "TP2"])
def test_ppo_logs_the_same_numbers_with_both(layout: list[str], mcore_python: Path, tmp_path: Path) -> None:
    for name, python in (("here", Path(sys.executable)), ("newest", mcore_python)):
        megarl(python, "train_ppo", *WALKS, *layout, f"run.dir={tmp_path / name}", "checkpoint.save_last=true")
    here, newest = numbers(tmp_path / "here"), numbers(tmp_path / "newest")
    assert len(here) > 1
    assert newest == here
    assert_same_bits(final_tensors(tmp_path / "newest"), final_tensors(tmp_path / "here"))


@two_releases
@pytest.mark.parametrize(("first", "then"), [("here", "newest"), ("newest", "here")])
def test_a_run_goes_on_with_the_other_bit_for_bit(first: str, then: str, mcore_python: Path, tmp_path: Path) -> None:
    """With dropout, whose generators are in the checkpoint."""
    pythons = {"here": Path(sys.executable), "newest": mcore_python}
    settings = [*SMALL, *SIX, "model.dropout=0.1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    megarl(pythons[first], "train_sft", *settings, f"run.dir={whole}")
    megarl(pythons[then], "train_sft", *settings, f"run.dir={resumed}", f"run.resume={after_three_steps(whole)}")
    assert len(course(whole)) == 12
    assert course(resumed) == course(whole)[6:]
    assert_same_bits(final_tensors(resumed), final_tensors(whole))
