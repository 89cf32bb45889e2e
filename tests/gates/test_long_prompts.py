"""Prompts that leave no room for a response, in whole commands: refused at the start, left out or cut, never later."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarl.checkpoint import find

TINY = [
    *("model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.max_positions=64"),
    *("trainer.progress=none", "rollout.max_new_tokens=16"),
]
QUICK = [
    *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "logger.tensorboard=false"),
    *("reward.fn=rewards.py:score", "run.dir=run", "checkpoint.every=1"),
]
PHASES = [*TINY, *QUICK, "trainer.max_phases=8", "ppo.rollouts=2", "rollout.n=2"]
BEST = [*TINY, *QUICK, "trainer.max_phases=8", "rollout.n=2", "rft.prompts=3", "eval.sweep.temperature=[0,1]"]
SAMPLES = ["data.train=[samples.jsonl]", "data.seq_length=64", "data.cache=null", "eval.sweep.beta=[0,1]"]
SHORT, LONG = "a" * 20, "b" * 90  # of 48 tokens that there is room for

SCORES = "def score(outputs, **_):\n    return [float(len(set(output))) for output in outputs]\n"

SCRIPT = """
import megarl, sys

prompts = ["a", "b", "c", "d" * 90, "e"]
config = megarl.default_config("ppo", *sys.argv[1:])
megarl.train(reward_fn=lambda outputs, **_: [float(len(o)) for o in outputs], prompts=prompts, config=config)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 prompts of which the 18th is too long, a file in which only one is not, and samples with rewards."""
    prompts = {"one_long": [SHORT] * 17 + [LONG] + [SHORT] * 22, "one_short": [LONG] * 20 + [SHORT] + [LONG] * 19}
    for name, texts in prompts.items():
        write(tmp_path / f"{name}.jsonl", [{"prompt": text} for text in texts])
    write(tmp_path / "samples.jsonl", [{"samples": [SHORT, "x"], "rewards": n} for n in range(8)])
    (tmp_path / "rewards.py").write_text(SCORES)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def write(path: Path, records: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False
    )


def steps(folder: Path) -> list[str]:
    """Steps of which a training metric was logged."""
    path = folder / "run" / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file) if row.get("train/lr")]


@pytest.mark.gate
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "where"),
    [
        (["-m", "megarl.train_ppo", *PHASES, "data.train=[one_long.jsonl]"], "one_long.jsonl:18"),
        (
            ["-m", "megarl.train_ppo", *PHASES, "data.train=[one_long.jsonl]", "trainer.devices=2"],
            "one_long.jsonl:18",
        ),
        (
            ["-m", "megarl.train_rft", *BEST, "data.train=[one_short.jsonl]"],
            "one_short.jsonl:1",
        ),
        (
            ["-m", "megarl.train_ilql", *TINY, *QUICK, *SAMPLES, "data.eval=[one_short.jsonl]"],
            "one_short.jsonl:1",
        ),
        (["-m", "megarl.generate", *TINY, "prompts=one_long.jsonl", "out=run"], "one_long.jsonl:18"),
        (["script.py", *PHASES[:-1], "rollout.n=1", "reward.fn=null"], "prompts[3]"),
    ],
    ids=["ppo", "two processes", "rft", "ilql's evaluation", "generate", "python"],
)
def test_by_default_a_run_is_refused_before_its_first_phase(command: list[str], where: str, folder: Path) -> None:
    ended = run(folder, *command)
    assert "Traceback" not in ended.stderr if command[0] == "-m" else where in ended.stderr
    assert (ended.returncode, where in ended.stderr) == (2 if command[0] == "-m" else 1, True), ended.stderr
    assert steps(folder) == []
    assert not find(folder / "run" / "checkpoints")


@pytest.mark.gate
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("entry", "settings"),
    [
        ("train_ppo", [*PHASES, "data.train=[one_short.jsonl]", "rollout.too_long=drop"]),
        ("train_ppo", [*PHASES, "data.train=[one_short.jsonl]", "rollout.too_long=truncate", "ppo.rollouts=16"]),
        (
            "train_rft",
            [*BEST, "data.train=[one_short.jsonl]", "data.eval=[one_short.jsonl]", "rollout.too_long=drop"],
        ),
        ("train_ppo", [*PHASES, "data.train=[one_long.jsonl]", "rollout.too_long=drop", "trainer.devices=2"]),
    ],
    ids=["ppo, all but one left out", "ppo, all but one cut", "rft with evaluations", "two processes"],
)
def test_a_run_goes_to_its_end_as_long_as_one_prompt_can_be_answered(
    entry: str, settings: list[str], folder: Path
) -> None:
    ended = run(folder, "-m", f"megarl.{entry}", *settings)
    assert ended.returncode == 0, ended.stderr
    assert steps(folder) == [str(step) for step in range(1, 9)]
    lines = [line for line in ended.stderr.splitlines() if "prompts are longer than 48 tokens" in line]
    assert len(lines) == 1 + ("data.eval" in " ".join(settings)), ended.stderr
