"""Every algorithm on a T5: the same steps in every layout, a start at the reference, exact resume after a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.checkpoint import find
from megarl.training import module_of
from tests.e2e.encoder_decoders import ALGORITHMS, run, save_model, write_data
from tests.e2e.runs import assert_same_bits, final_tensors, metrics
from tests.gated import gated
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, []),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
}
CASES = [(algorithm, layout) for algorithm in ALGORITHMS for layout in LAYOUTS]
FAST = [("ppo", "TP2"), ("ppo", "PP2"), ("sft", "DP2"), ("ilql", "TP2"), ("dpo", "PP2")]
SAVED = ["checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.save_last=true", "checkpoint.async_save=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t5")
    save_model(root / "model")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def alone(worlds: Worlds, folder: Path) -> Callable[[str], Path]:
    """The run of an algorithm in one process, made when it is first needed."""

    def made(algorithm: str) -> Path:
        run_dir = folder / "alone" / algorithm
        if not run_dir.exists():
            worlds.run(1, run, run_dir, algorithm, folder, *SAVED)
        return run_dir

    return made


@pytest.mark.parametrize(("algorithm", "layout"), gated(CASES, [case for case in CASES if case not in FAST]))
def test_every_algorithm_takes_the_same_steps_in_every_layout(
    algorithm: str, layout: str, worlds: Worlds, folder: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ALGORITHMS[algorithm][1]
    wanted = metrics(alone(algorithm), *names)
    assert len(wanted) == len(set(wanted)) == 3
    size, overrides = LAYOUTS[layout]
    worlds.run(size, run, tmp_path / "run", algorithm, folder, *overrides)
    for ours, theirs in zip(metrics(tmp_path / "run", *names), wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("algorithm", gated(["ppo", "grpo"], ["grpo"]))
def test_the_first_responses_are_those_of_the_reference(algorithm: str, alone: Callable[[str], Path]) -> None:
    (first,), *later = metrics(alone(algorithm), "rollout/kl")
    assert first == 0.0
    assert all(kl != 0.0 for (kl,) in later)


def killed(run_dir: Path, algorithm: str, folder: Path, *overrides: str) -> None:
    """Train, in processes that are killed in the step after the first checkpoint."""
    kind: Any = module_of(algorithm)
    step = kind.training_step

    def training_step(self: Any, *given: Any) -> Any:
        if find(run_dir / "checkpoints"):
            time.sleep(0.2)  # until every process has seen it
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    kind.training_step = training_step
    run(run_dir, algorithm, folder, *overrides)


@pytest.mark.parametrize("algorithm", gated(["ppo", "sft", "ilql", "rft", "dpo", "rm"], ["ilql", "rft", "dpo", "rm"]))
def test_a_killed_run_ends_in_the_weights_of_the_unbroken_one(
    algorithm: str, worlds: Worlds, folder: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    with contextlib.suppress(EOFError, ConnectionResetError):
        worlds.run(1, killed, tmp_path, algorithm, folder, *SAVED)
    assert len(find(tmp_path / "checkpoints")) == 1
    worlds.run(1, run, tmp_path, algorithm, folder, *SAVED)
    assert_same_bits(final_tensors(tmp_path), final_tensors(alone(algorithm)))
