"""ILQL on the randomwalks task: the values find paths that the walks do not show, on several graphs and from several
initial models."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

GRAPHS, SEEDS = (1000, 1005, 1008), (1, 2, 3)


def run(folder: Path, graph: int, seed: int, *overrides: str) -> dict[str, dict[str, float]]:
    """The metrics of a whole run of the preset."""
    command = [sys.executable, "-m", "megarl.train_ilql", "+conf=randomwalks_ilql", f"data.options.seed={graph}"]
    done = subprocess.run(
        [
            *command,
            f"seed={seed}",
            f"run.dir={folder}",
            "trainer.progress=none",
            "logger.tensorboard=false",
            *overrides,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics: dict[str, dict[str, float]] = json.loads((folder / "summary.json").read_text())["metrics"]
    return metrics


@pytest.mark.gate
def test_the_values_find_short_paths(tmp_path: Path) -> None:
    """Judged by the mean of the last five evaluations; the walks themselves come to .35, .15 and .30."""
    found: dict[tuple[int, int], dict[float, float]] = {}
    for graph in GRAPHS:
        for seed in SEEDS:
            metrics = run(tmp_path / f"{graph}-{seed}", graph, seed)
            found[graph, seed] = {beta: metrics[f"eval/optimality@beta={beta:g}"]["last5"] for beta in (0, 1, 100)}
    at_100 = {run: values[100] for run, values in found.items()}
    assert min(at_100.values()) >= 0.92, found
    assert sum(at_100.values()) / len(at_100) >= 0.96, found
    for graph in GRAPHS:
        by_beta = [sum(found[graph, seed][beta] for seed in SEEDS) for beta in (0, 1, 100)]
        assert by_beta == sorted(by_beta), (graph, found)


@pytest.mark.gate
def test_equal_rewards_teach_nothing_and_break_nothing(tmp_path: Path) -> None:
    """On this graph no walk reaches the goal."""
    metrics = run(tmp_path, 1001, 1)
    assert metrics["eval/optimality@beta=100"]["last5"] == 0
    assert all(math.isfinite(values["last"]) for values in metrics.values())
