"""The examples do what they say, from any folder."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.gate


def said(name: str, folder: Path) -> list[str]:
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ppo_learns_to_say_more_letters(tmp_path: Path) -> None:
    scores, answer = said("ppo_words.py", tmp_path)
    values = ast.literal_eval(scores.partition(": ")[2])
    assert len(values) == 20
    assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 5.0
    assert isinstance(ast.literal_eval(answer)[0], str)


def test_values_steer_towards_the_better_answer(tmp_path: Path) -> None:
    lines = said("ilql_rewards.py", tmp_path)
    assert [line.partition(":")[0] for line in lines] == ["beta 0", "beta 4"]
    assert "geese" in lines[1]


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"ppo_words.py", "ilql_rewards.py"}


def test_the_sentiment_preset_learns_kinder_answers(tmp_path: Path) -> None:
    command = ["megarl.train_ppo", "+conf=sentiment", f"run.dir={tmp_path}", "trainer.max_phases=10"]
    done = subprocess.run(
        [sys.executable, "-m", *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    score = json.loads((tmp_path / "summary.json").read_text())["metrics"]["eval/score"]
    assert abs(score["first"]) < 0.4, "cloned answers are as often pleased as not"
    assert score["last"] > 0.55
