"""The task with known results: short paths are found on every graph that has them; one without breaks nothing."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GRAPHS, SEEDS = (1000, 1005, 1008), (1, 2, 3)
OPTIMALITY = "eval/optimality"
MEAN_OF_ALL, LEAST = 0.95, 0.90  # of the mean of a run's last five evaluations


def run(folder: Path, graph: int, seed: int, *more: str, entry: str = "train_ppo") -> dict[str, Any]:
    """What the run came to; without `more` it is the one that anybody would start."""
    settings = ["+conf=randomwalks", f"data.options.seed={graph}", f"seed={seed}", f"run.dir={folder}", *more]
    done = subprocess.run(
        [sys.executable, "-m", f"megarl.{entry}", *settings, "trainer.progress=none"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    with (folder / "metrics.csv").open() as file:
        values = [float(value) for row in csv.DictReader(file) for value in row.values() if value]
    assert all(math.isfinite(value) for value in values)
    return summary


@pytest.mark.gate
@pytest.mark.timeout(6 * 3600)
def test_short_paths_are_found_on_every_graph_and_seed(tmp_path: Path) -> None:
    reached: dict[tuple[int, int], float] = {}
    for graph in GRAPHS:
        for seed in SEEDS:
            found = run(tmp_path / f"{graph}-{seed}", graph, seed)["metrics"][OPTIMALITY]
            reached[graph, seed] = found["last5"]
            print(f"graph {graph} seed {seed}: {found['first']:.3f} to {found['last5']:.3f}")  # noqa: T201
    assert min(reached.values()) >= LEAST, reached
    assert sum(reached.values()) / len(reached) >= MEAN_OF_ALL, reached


@pytest.mark.gate
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("graph", GRAPHS[:2])
def test_adapters_beside_a_base_in_four_bits_learn_the_short_paths(graph: int, tmp_path: Path) -> None:
    """The base is cloned from walks, exported, and read again in 4 bits."""
    base = tmp_path / "base"
    cloned = ["data.train=[megarl.tasks.randomwalks:walks]", "data.eval=[]", "data.seq_length=16", f"export.hf={base}"]
    steps = ["trainer.max_steps=320", "trainer.eval_every=null", "optim.lr=1e-3", "optim.schedule=constant"]
    run(tmp_path / "sft", graph, 1, *cloned, *steps, entry="train_sft")
    adapter = ["adapter.base_bits=4", "adapter.rank=16", "optim.lr=2e-3"]
    found = run(tmp_path / "ppo", graph, 1, f"model.path={base}", "clone.data=[]", *adapter)["metrics"][OPTIMALITY]
    print(f"graph {graph}: {found['first']:.3f} to {found['last5']:.3f}")  # noqa: T201
    assert found["last5"] >= LEAST


@pytest.mark.gate
@pytest.mark.timeout(3600)
def test_a_graph_whose_goal_cannot_be_reached_ends_in_numbers(tmp_path: Path) -> None:
    found = run(tmp_path, graph=1001, seed=1)["metrics"][OPTIMALITY]
    assert all(value is not None and math.isfinite(value) for value in found.values())
