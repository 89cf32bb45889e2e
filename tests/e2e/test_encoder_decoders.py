"""Every algorithm on a T5: the same steps in every layout, a start at the reference, exact resume after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.encoder_decoders import run, save_model
from tests.e2e.every_algorithm import ALGORITHMS, Kind, write_data
from tests.e2e.runs import metrics
from tests.gated import gated
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, ["trainer.micro_batch_size=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
}
CASES = [(algorithm, layout) for algorithm in ALGORITHMS for layout in LAYOUTS]
FAST = [("ppo", "PP2"), ("sft", "DP2"), ("ilql", "TP2"), ("dpo", "PP2")]


@pytest.fixture(scope="module")
def kind(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    root = tmp_path_factory.mktemp("t5")
    save_model(root / "model")
    write_data(root)
    return Kind(run, root, worlds)


@pytest.mark.parametrize(("algorithm", "layout"), gated(CASES, [case for case in CASES if case not in FAST]))
def test_every_algorithm_takes_the_same_steps_in_every_layout(
    algorithm: str, layout: str, kind: Kind, tmp_path: Path
) -> None:
    kind.check_steps(algorithm, LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize("algorithm", gated(["ppo", "grpo"], ["grpo"]))
def test_the_first_responses_are_those_of_the_reference(algorithm: str, kind: Kind) -> None:
    (first,), *later = metrics(kind.alone(algorithm), "rollout/kl")
    assert first == 0.0
    assert all(kl != 0.0 for (kl,) in later)


@pytest.mark.parametrize("algorithm", gated(["ppo", "sft", "ilql", "rft", "dpo", "rm"], ["ilql", "rft", "dpo", "rm"]))
def test_a_killed_run_ends_in_the_weights_of_the_unbroken_one(algorithm: str, kind: Kind, tmp_path: Path) -> None:
    kind.check_resume(algorithm, (1, []), tmp_path, kind.alone(algorithm))
