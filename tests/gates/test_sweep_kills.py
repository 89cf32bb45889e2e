"""Sweeps of four runs that are killed with SIGKILL: they end with the numbers of a sweep that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import SMALL

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]
PATIENCE_S = 600.0
KINDS = {
    "random": ["sweep.trials=4", "trainer.max_steps=12"],
    "hyperband": ["sweep.kind=hyperband", "sweep.trials=4", "sweep.eta=2", "sweep.min_budget=3", "sweep.max_budget=12"],
}
RUN = [
    *SMALL,
    *("model.num_layers=2", "model.hidden_size=32", "optim.schedule=constant", "checkpoint.every=1"),
    *("sweep.metric=train/loss", "sweep.optim.lr=loguniform(1e-4,1e-2)"),
]


def command(folder: Path, kind: str, at_once: int) -> list[str]:
    own = [f"sweep.dir={folder}", f"sweep.at_once={at_once}"]
    return [sys.executable, "-m", "megarl", "sweep", "sft", *RUN, *KINDS[kind], *own]


def results(folder: Path) -> dict[int, tuple[str, float]]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {row["trial"]: (row["optim.lr"], row["train/loss"]) for row in found["trials"]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_that_is_killed_again_and_again_ends_alike(kind: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, kind, 2), check=True, timeout=PATIENCE_S)
    draw, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(command(killed, kind, 2), stderr=subprocess.PIPE)
        before, goal, end = checkpoints(killed), draw.randint(1, 8), time.monotonic() + PATIENCE_S
        new: set[Path] = set()
        while process.poll() is None and len(new) < goal:
            new |= checkpoints(killed) - before
            assert time.monotonic() < end
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read()
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert results(killed) == results(whole)
    assert len(results(whole)) == 4


def checkpoints(folder: Path) -> set[Path]:
    """Every checkpoint that there is now; older ones are removed as new ones are written."""
    return set(folder.glob("trials/*/run/checkpoints/step-*"))
