"""An encoder-decoder with random weights on the copy task: PPO finds the right word from a cloned start that writes it
half of the time, and the values of ILQL find it in samples of which half are right."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SEEDS = (1, 2, 3)
CPU_SECONDS = 300  # of cloning and PPO together, with all that a run does beside them
TASK = "tests.gates.copy_task"
SETTINGS = [
    *("model.encoder.num_layers=2", "model.num_layers=2", "model.position=relative", "model.activation=geglu"),
    *("model.encoder.buckets=16", "model.encoder.longest_distance=20", "model.encoder.scale_outputs=false"),
    *("model.hidden_size=64", "model.num_heads=4", "model.max_positions=32"),
    *("tokenizer.kind=characters", "tokenizer.path=abcdefgh_", "rollout.max_new_tokens=6"),
    *(f"data.eval=[{TASK}:held_out]", f"reward.fn={TASK}:exact"),
    *("optim.schedule=linear", "optim.warmup_steps=0"),
    *("trainer.global_batch_size=64", "trainer.micro_batch_size=64"),
    *("checkpoint.every=null", "checkpoint.save_last=false", "trainer.progress=none", "logger.tensorboard=false"),
]
PPO = [
    *(f"data.train=[{TASK}:prompts]", f"clone.data=[{TASK}:samples]", "clone.steps=1500", "clone.lr=2e-3"),
    *("ppo.rollouts=256", "ppo.inner_epochs=4", "ppo.kl_coef=0", "optim.lr=5e-4"),
    *("trainer.max_phases=60", "trainer.eval_every=10"),
]
ILQL = [
    *(f"data.train=[{TASK}:rated]", "data.cache=null", "data.seq_length=32", "ilql.target_alpha=0.1"),
    *("optim.lr=2e-3", "trainer.max_steps=3200", "trainer.eval_every=1600", "eval.sweep.beta=[0,4]"),
]


def cpu_seconds() -> float:
    """Return the CPU time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(folder: Path, entry: str, seed: int, *settings: str) -> dict[str, Any]:
    """Return the metrics of a run, and its CPU time as `cpu`."""
    before = cpu_seconds()
    command = [sys.executable, "-m", f"megarl.{entry}", *SETTINGS, *settings, f"seed={seed}", f"run.dir={folder}"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    metrics: dict[str, Any] = json.loads((folder / "summary.json").read_text())["metrics"]
    return {**metrics, "cpu": cpu_seconds() - before}


@pytest.mark.gate
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_copies_the_second_word_from_a_start_that_copies_any(seed: int, tmp_path: Path) -> None:
    found = run(tmp_path / "run", "train_ppo", seed, *PPO)
    score = found["eval/score"]
    print(f"seed {seed}: {score['first']:.3f} to {score['last']:.3f} in {found['cpu']:.0f} s of CPU time")  # noqa: T201
    assert score["first"] < 0.6
    assert score["last"] >= 0.95
    assert found["cpu"] <= CPU_SECONDS


@pytest.mark.gate
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_values_of_ilql_choose_the_word_that_half_of_the_samples_have(seed: int, tmp_path: Path) -> None:
    found = run(tmp_path / "run", "train_ilql", seed, *ILQL)
    alone, guided = (found[f"eval/score@beta={beta}"]["last"] for beta in (0, 4))
    print(f"seed {seed}: {alone:.3f} alone, {guided:.3f} with values, {found['cpu']:.0f} s of CPU time")  # noqa: T201
    assert alone < 0.65
    assert guided >= 0.9
