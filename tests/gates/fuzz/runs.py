"""Tiny runs that leave well-formed checkpoints, journals, dumps and breadcrumbs to spoil."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY = [
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.max_positions=64",
    "trainer.progress=none",
    "logger.tensorboard=false",
]
SFT = [*TINY, "data.seq_length=32", "data.eval=[]", "trainer.global_batch_size=2", "trainer.micro_batch_size=2"]
PPO = [
    *TINY,
    "data.train=[prompts.jsonl]",
    "reward.fn=rewards.py:score",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=4",
    "ppo.rollouts=4",
    "ppo.inner_epochs=1",
    "rollout.max_new_tokens=4",
    "trainer.max_phases=2",
]
PROMPTS = "".join(f'{{"prompt": "question {number}", "answer": {number}}}\n' for number in range(8))
REWARDS = "def score(outputs, **_):\n    return [float(len(output)) for output in outputs]\n"


def sft_run(store: Path) -> Path:
    """The folder of an SFT run with checkpoints of steps 1 and 2; it is run once."""
    run_dir = store.parent / "sft run"
    if not run_dir.is_dir():
        finish("train_sft", [*SFT, "trainer.max_steps=2", "checkpoint.every=1", f"run.dir='{run_dir}'"], store)
    return run_dir


def ppo_run(store: Path) -> Path:
    """The folder of a PPO run of two phases, with its journal, a dump and the files it read; it is run once."""
    home = store.parent / "ppo"
    if not home.is_dir():
        lay_ppo(home)
        finish("train_ppo", [*PPO, "run.dir=run", "rollout.dump=dump", "checkpoint.every=1"], home)
    return home


def lay_ppo(folder: Path) -> None:
    """Prompts and a reward function for the settings of `PPO`."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text(PROMPTS)
    (folder / "rewards.py").write_text(REWARDS)


def finish(module: str, words: list[str], folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", f"megarl.{module}", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
