"""Every algorithm with sequences that are split over processes: the same steps as in one process, and exact resume
after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.every_algorithm import ALGORITHMS, SAVED, Kind, train, write_data
from tests.gated import gated
from tests.worlds import Worlds

MODEL = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.position=rope",
    "model.init_std=0.1",
]
LAYOUTS = {
    "CP2": (2, ["parallel.cp=2"]),
    "CP2xTP2": (4, ["parallel.cp=2", "parallel.tp=2"]),
    "CP2xTP2+SP": (4, ["parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true"]),
    "CP2xPP2": (4, ["parallel.cp=2", "parallel.pp=2"]),
    "CP2xDP2": (4, ["parallel.cp=2"]),
}
CASES = [(algorithm, layout) for algorithm in ALGORITHMS for layout in LAYOUTS]
FAST = [("ppo", "CP2xPP2"), ("ilql", "CP2"), ("dpo", "CP2")]


def run(run_dir: Path, algorithm: str, folder: Path, *overrides: str) -> None:
    train(run_dir, algorithm, folder, *MODEL, *overrides)


@pytest.fixture(scope="module")
def kind(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    root = tmp_path_factory.mktemp("context")
    write_data(root)
    return Kind(run, root, worlds)


@pytest.mark.parametrize(("algorithm", "layout"), gated(CASES, [case for case in CASES if case not in FAST]))
def test_every_algorithm_takes_the_steps_of_one_process(
    algorithm: str, layout: str, kind: Kind, tmp_path: Path
) -> None:
    kind.check_steps(algorithm, LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize("algorithm", gated(["ppo", "sft", "ilql", "dpo"], ["sft", "ilql", "dpo"]))
def test_a_killed_run_ends_in_the_weights_of_the_unbroken_one(algorithm: str, kind: Kind, tmp_path: Path) -> None:
    kind.train(tmp_path / "unbroken", algorithm, LAYOUTS["CP2"], *SAVED)
    kind.check_resume(algorithm, LAYOUTS["CP2"], tmp_path / "run", tmp_path / "unbroken")
