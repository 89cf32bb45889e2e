"""`megarl compare` of this revision with itself, and with a copy whose optimizer steps the wrong way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import SMALL

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
RUN = [
    *SMALL,
    *("model.num_layers=2", "model.hidden_size=32", "trainer.max_steps=12", "optim.lr=1e-2"),
    *("compare.metric=train/loss", "compare.seeds=3", "compare.at_once=2", "--fail"),
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a commit `broken`, in which the loss has the wrong sign."""
    folder = tmp_path_factory.mktemp("clone") / "megarl"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    path = folder / "megarl" / "modules" / "losses.py"
    text = path.read_text()
    assert text.count("aggregate(-logprobs,") == 1
    path.write_text(text.replace("aggregate(-logprobs,", "aggregate(logprobs,"))
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, "commit", "-qam", "break it"], check=True)
    subprocess.run(["git", "-C", str(folder), "branch", "broken"], check=True)
    subprocess.run(["git", "-C", str(folder), "reset", "-q", "--hard", "HEAD~1"], check=True)
    return folder


def compared(repository: Path, a: str, b: str, folder: Path) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "megarl", "compare", "sft", a, b, *RUN, f"compare.dir={folder}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=repository, env=environ, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads((folder / "differences.json").read_text())
    return done.returncode, found["train/loss"]


def test_a_revision_does_not_differ_from_itself(repository: Path, tmp_path: Path) -> None:
    code, loss = compared(repository, "HEAD", "HEAD", tmp_path / "out")
    assert (code, loss["equal"]) == (0, True)


def test_a_broken_revision_is_found(repository: Path, tmp_path: Path) -> None:
    code, loss = compared(repository, "HEAD", "broken", tmp_path / "out")
    assert (code, loss["differs"]) == (1, True)
