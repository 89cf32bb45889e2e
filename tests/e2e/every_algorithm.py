"""Short runs of every algorithm on small data, for tests of one kind of model each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megarl.checkpoint import find
from megarl.training import module_of
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_entry
from tests.worlds import Worlds

Run = Callable[..., None]
"""Trains a kind of model: (run folder, algorithm, folder of the data, *overrides)."""
Layout = tuple[int, list[str]]
"""A number of processes, and the settings that lay the model out over them."""
STEPS = 3
SAVED = ["checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.save_last=true", "checkpoint.async_save=false"]
SHARED = [
    "seed=7",
    "tokenizer.kind=bytes",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.eval_every=null",
    "trainer.log_every=1",
    "trainer.progress=none",
    "logger.tensorboard=false",
    "checkpoint.every=null",
    "checkpoint.save_last=false",
    "checkpoint.best.keep=0",
    "optim.lr=1e-3",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
]
ROLLOUTS = [
    "rollout.max_new_tokens=7",
    "trainer.max_phases=3",
    "reward.fn=megarl.rewards.builtin:length",
    "data.eval=[]",
]
UPDATES = ["ppo.rollouts=8", "ppo.inner_epochs=2", "ppo.stop_at_kl=null"]
SUPERVISED = [f"trainer.max_steps={STEPS}", "data.seq_length=64"]
PREFERENCES = [*SUPERVISED, "data.train=[{data}/pairs.jsonl]", "data.eval=[]"]
ALGORITHMS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "sft": ([*SUPERVISED, "data.train=[{data}/completions.jsonl]", "data.eval=[]"], ("train/loss", "train/grad_norm")),
    "ppo": (
        [*ROLLOUTS, *UPDATES, "data.train=[{data}/prompts.jsonl]"],
        ("rollout/score", "rollout/kl", "rollout/entropy", "policy/loss", "value/loss", "train/grad_norm"),
    ),
    "grpo": (
        [*ROLLOUTS, *UPDATES, "rollout.n=4", "data.train=[{data}/prompts.jsonl]"],
        ("rollout/score", "rollout/entropy", "policy/loss", "train/grad_norm"),
    ),
    "rft": (
        [*ROLLOUTS, "rollout.n=2", "data.train=[{data}/prompts.jsonl]"],
        ("rollout/score", "train/loss"),
    ),
    "ilql": (
        [*SUPERVISED, "data.train=[{data}/rewarded.jsonl]", "data.eval=[]", "data.cache=null"],
        ("train/loss", "train/loss_q", "train/loss_v", "train/loss_cql", "train/grad_norm"),
    ),
    "dpo": ([*PREFERENCES, "dpo.reference=resident"], ("train/loss", "train/margin", "train/grad_norm")),
    "kto": ([*PREFERENCES, "kto.reference=resident"], ("train/loss", "train/grad_norm")),
    "orpo": (PREFERENCES, ("train/loss", "train/grad_norm")),
    "cpo": (PREFERENCES, ("train/loss", "train/grad_norm")),
    "rm": (PREFERENCES, ("train/loss", "train/grad_norm")),
}
"""Settings of each algorithm, and the metrics that must not depend on the layout."""


def write_data(folder: Path) -> None:
    """Write prompts, completions, pairs and rewarded samples of unequal lengths."""
    random = Random(5)

    def text(letters: str) -> str:
        return "".join(random.choices(letters, k=random.randint(2, 16)))

    kinds = {
        "prompts": lambda: {"prompt": text("abcde")},
        "completions": lambda: {"prompt": text("abcde"), "completion": text("fghij")},
        "pairs": lambda: {"prompt": text("abcde"), "chosen": text("aeiou"), "rejected": text("xyzwv")},
        "rewarded": lambda: {"samples": [text("abcde"), text("fghij")], "rewards": random.random()},
    }
    for name, record in kinds.items():
        lines = [json.dumps(record()) for _ in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def train(run_dir: Path, algorithm: str, folder: Path, *overrides: str) -> None:
    """Train in the current world on the data of a folder."""
    settings = [setting.format(data=folder) for setting in ALGORITHMS[algorithm][0]]
    run_entry(algorithm, [*SHARED, *settings, f"run.dir={run_dir}", *overrides])


def killed(run: Run, run_dir: Path, algorithm: str, folder: Path, *overrides: str) -> None:
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


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is trained, and a folder with data for every algorithm."""

    run: Run
    folder: Path
    worlds: Worlds

    def alone(self, algorithm: str) -> Path:
        """The run of an algorithm in one process, which is made when it is first needed."""
        run_dir = self.folder / "alone" / algorithm
        if not run_dir.exists():
            self.train(run_dir, algorithm, (1, []), *SAVED)
        return run_dir

    def train(self, run_dir: Path, algorithm: str, layout: Layout, *overrides: str) -> None:
        """Train in a layout."""
        size, of_layout = layout
        self.worlds.run(size, self.run, run_dir, algorithm, self.folder, *of_layout, *overrides)

    def check_steps(self, algorithm: str, layout: Layout, run_dir: Path, *others: str) -> None:
        """Train in a layout, which must have the steps of one process; `others` are more metrics to compare."""
        self.train(run_dir, algorithm, layout)
        assert_same_steps(run_dir, self.alone(algorithm), (*ALGORITHMS[algorithm][1], *others))

    def check_resume(self, algorithm: str, layout: Layout, run_dir: Path, unbroken: Path) -> None:
        """Train in processes that are killed after the first checkpoint, and again to the end: with the weights of an
        unbroken run, bit for bit."""
        size, of_layout = layout
        with contextlib.suppress(EOFError, ConnectionResetError):
            self.worlds.run(size, killed, self.run, run_dir, algorithm, self.folder, *SAVED, *of_layout)
        assert len(find(run_dir / "checkpoints")) == 1
        self.train(run_dir, algorithm, layout, *SAVED)
        assert_same_bits(final_tensors(run_dir), final_tensors(unbroken))


def assert_same_steps(run_dir: Path, other: Path, names: Sequence[str]) -> None:
    """Compare the metrics of three steps, of which no two are the same."""
    wanted = metrics(other, *names)
    assert len(wanted) == len(set(wanted)) == STEPS
    for ours, theirs in zip(metrics(run_dir, *names), wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)
