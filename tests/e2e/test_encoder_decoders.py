"""Every algorithm on a T5: the same steps in every layout, a start at the reference, exact resume after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.encoder_decoders import run, save_model
from tests.e2e.every_algorithm import ALGORITHMS, alone_in, assert_same_steps, train_killed_and_resumed, write_data
from tests.e2e.runs import assert_same_bits, final_tensors, metrics
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t5")
    save_model(root / "model")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def alone(worlds: Worlds, folder: Path) -> Callable[[str], Path]:
    return alone_in(folder, worlds, run)


@pytest.mark.parametrize(("algorithm", "layout"), gated(CASES, [case for case in CASES if case not in FAST]))
def test_every_algorithm_takes_the_same_steps_in_every_layout(
    algorithm: str, layout: str, worlds: Worlds, folder: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    size, overrides = LAYOUTS[layout]
    worlds.run(size, run, tmp_path / "run", algorithm, folder, *overrides)
    assert_same_steps(tmp_path / "run", alone(algorithm), ALGORITHMS[algorithm][1])


@pytest.mark.parametrize("algorithm", gated(["ppo", "grpo"], ["grpo"]))
def test_the_first_responses_are_those_of_the_reference(algorithm: str, alone: Callable[[str], Path]) -> None:
    (first,), *later = metrics(alone(algorithm), "rollout/kl")
    assert first == 0.0
    assert all(kl != 0.0 for (kl,) in later)


@pytest.mark.parametrize("algorithm", gated(["ppo", "sft", "ilql", "rft", "dpo", "rm"], ["ilql", "rft", "dpo", "rm"]))
def test_a_killed_run_ends_in_the_weights_of_the_unbroken_one(
    algorithm: str, worlds: Worlds, folder: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    train_killed_and_resumed(worlds, 1, run, tmp_path, algorithm, folder)
    assert_same_bits(final_tensors(tmp_path), final_tensors(alone(algorithm)))
