"""examples/instruct: its steps, as their scripts write them, for a few steps each."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.e2e.runs import metrics, run_entry
from tests.worlds import Worlds

EXAMPLE = Path(__file__).parents[2] / "examples" / "instruct"
QUIET = ["trainer.progress=none", "logger.tensorboard=false", "checkpoint.every=null", "trainer.log_every=1"]


def words_of(script: Path, folder: Path) -> tuple[str, list[str]]:
    """The entry point that a script starts, and its settings."""
    stand_in = folder / "python"
    stand_in.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stand_in.chmod(0o755)
    command = ["bash", script, *QUIET]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(stand_in)}, capture_output=True, text=True)
    _, program, *words = json.loads(done.stdout)
    return program.removeprefix("megarl.train_"), words


def run_step(folder: Path, entry: str, words: list[str]) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_entry(entry, words)
    finally:
        os.chdir(before)


def test_the_steps_follow_each_other(worlds: Worlds, tmp_path: Path) -> None:
    shorter = {
        "sft.sh": ["trainer.max_steps=30"],
        "rm.sh": ["trainer.max_steps=6", "trainer.eval_every=6", "data.eval_limit=16"],
        "ppo.sh": ["trainer.max_phases=1", "rollout.max_new_tokens=16", "ppo.rollouts=32"],
    }
    for script, settings in shorter.items():
        entry, words = words_of(EXAMPLE / script, tmp_path)
        worlds.run(1, run_step, tmp_path, entry, [*words, *settings])
    runs = tmp_path / "runs" / "instruct"
    losses = metrics(runs / "sft", "train/loss")
    assert losses[-1][0] < 0.6 * losses[0][0]
    assert len(metrics(runs / "rm", "eval/accuracy")) == 1
    assert len(metrics(runs / "ppo", "eval/score", "eval/utility")) > 0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("We repair it. Thank you.", 1),
        ("We repair it.", 2 / 3),
        ("Look it up.", 1 / 3),
        ("We repair it. We have a lot to do here, so it may take a while. Thank you.", 2 / 3),
        ("It comes today. We have a lot to do here, so it may take a while.", 0),
    ],
)
def test_a_good_answer_is_right_polite_and_short(output: str, expected: float) -> None:
    utility = runpy.run_path(str(EXAMPLE / "tasks.py"))["utility"]
    (found,) = utility(prompts=["Answer the customer.\n\nMy kettle is broken.\n\n"], outputs=[output])
    assert found == pytest.approx(expected)


def test_the_preferred_answer_has_the_higher_utility() -> None:
    tasks = SimpleNamespace(**runpy.run_path(str(EXAMPLE / "tasks.py")))
    pairs = tasks.pairs()
    better, worse = (
        tasks.utility([pair["input"] for pair in pairs], [pair[key] for pair in pairs])
        for key in ("chosen", "rejected")
    )
    assert all(one > two for one, two in zip(better, worse, strict=True))
    held_out = {(one["instruction"], one["input"]) for one in tasks.held_out_messages()}
    assert not held_out & {(one["instruction"], one["input"]) for one in [*tasks.answers(), *pairs]}
