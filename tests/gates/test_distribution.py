"""What a user gets works away from this checkout: the wheel in another folder, and a fresh clone's make targets."""

import json
import site
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import SMALL
from tests.gates.environments import ROOT, make_environment, run

TWO_STEPS = [*SMALL, "trainer.max_steps=2"]
UNSEEN = ["MAKEFLAGS", "MAKELEVEL", "VENV", "PYTHON", "PIP_CONSTRAINT"]  # what `make gates` itself was given


@pytest.mark.gate
def test_the_wheel_trains_in_another_folder(tmp_path: Path) -> None:
    """Built from the source archive, so that this holds what the wheel needs."""
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT),
        cwd=tmp_path,
        timeout=600,
    )
    (wheel,) = (tmp_path / "dist").glob("megarl-*.whl")
    python = make_environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path, timeout=300)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Dependencies come from here. That a .pth file's own folders have theirs ignored keeps this checkout out of sight.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "conf").mkdir()
    (elsewhere / "conf" / "mine.yaml").write_text("# @package _global_\nmodel:\n  num_layers: 4\n")
    found = run(python, "-c", "import megarl; print(megarl.__file__)", cwd=elsewhere, timeout=300).stdout.strip()
    assert Path(found).is_relative_to(packages)
    preset = run(python, "-m", "megarl.train_sft", "+conf=gpt20b", "--cfg", "job", cwd=elsewhere, timeout=300).stdout
    assert "num_layers: 44" in preset
    own = ["+conf=[gpt20b,mine]", "--cfg", "job"]
    assert "num_layers: 4\n" in run(python, "-m", "megarl.train_sft", *own, cwd=elsewhere, timeout=300).stdout

    run(python, "-m", "megarl.train_sft", *TWO_STEPS, "run.dir=out", cwd=elsewhere, timeout=600)
    summary = json.loads((elsewhere / "out" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 2
    script = tmp_path / "venv" / "bin" / "megarl-train-sft"
    assert "num_layers: 44" in run(script, "+conf=gpt20b", "--cfg", "job", cwd=elsewhere, timeout=300).stdout


def clone(folder: Path) -> Path:
    """What is committed here, and nothing else."""
    run("git", "clone", "-q", ROOT, folder, cwd=folder.parent, timeout=300)
    return folder


@pytest.mark.gate
def test_make_demo_works_in_a_fresh_clone(tmp_path: Path) -> None:
    fresh = clone(tmp_path / "clone")
    done = run("make", "demo", cwd=fresh, timeout=3000, without=UNSEEN)
    assert done.stdout.splitlines()[-1] == "all metrics: runs/demo/metrics.csv"
    summary = json.loads((fresh / "runs" / "demo" / "summary.json").read_text())
    assert summary["status"] == "finished"
    learned = summary["metrics"]["eval/optimality"]
    assert learned["first"] < 0.7
    assert learned["last5"] > 0.9
    assert run("git", "status", "--porcelain", cwd=fresh, timeout=60).stdout == ""


@pytest.mark.gate
def test_make_venv_is_enough_for_the_tests_in_a_fresh_clone(tmp_path: Path) -> None:
    """Two folders of tests stand for all: the rest runs in `make test`."""
    fresh = clone(tmp_path / "clone")
    run("make", "venv", cwd=fresh, timeout=3000, without=UNSEEN)
    tests = ("-m", "pytest", "tests/config", "tests/algorithms")
    passed = run(fresh / ".venv" / "bin" / "python", *tests, cwd=fresh, timeout=1200, without=UNSEEN)
    assert " passed" in passed.stdout or "[100%]" in passed.stdout
