"""The examples do what they say, from any folder."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hh import write_hh

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


def test_a_tiny_llama_learns_to_give_the_answer_with_more_votes(tmp_path: Path) -> None:
    stack = EXAMPLES / "stack_llama"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

    def run(*command: str | Path) -> str:
        quiet = ("trainer.progress=none",) if command[0] != sys.executable else ()
        done = subprocess.run(
            [*command, *quiet], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("bash", stack / "sft.sh")
    run("bash", stack / "dpo.sh", f"dpo.cache={tmp_path / 'cache'}")
    metrics = json.loads((tmp_path / "runs/stack_llama/dpo/summary.json").read_text())["metrics"]
    assert metrics["eval/accuracy"]["last"] > 0.95
    (tmp_path / "questions.jsonl").write_text(run(sys.executable, stack / "questions.py"))
    model = "model.path=runs/stack_llama/dpo"
    lines = run(sys.executable, "-m", "megarl.generate", model, "prompts=questions.jsonl").splitlines()
    responses = [json.loads(line)["response"] for line in lines]
    assert sum(response.startswith("Use `") for response in responses) > 0.7 * len(responses)


def test_ppo_against_a_reward_model_makes_answers_to_instructions_better(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", EXAMPLES / "instruct" / "run.sh"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(line.split()[2]) for line in done.stdout.splitlines() if ": utility " in line)
    assert before < 0.55
    assert after - before > (1 - before) / 2


def test_every_example_is_run_here() -> None:
    names = {"ppo_words.py", "ilql_rewards.py", "stack_llama", "instruct", "t5_summaries", "t5_sentiment"}
    assert {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"} == names


def test_the_hh_preset_learns_from_transcripts(tmp_path: Path) -> None:
    write_hh(tmp_path)
    files = [f"data.{name}=[{tmp_path}]" for name in ("train", "eval")]
    small = ["optim.lr=1e-3", "optim.warmup_steps=0", "trainer.max_steps=20", "trainer.eval_every=20"]
    batch = ["trainer.global_batch_size=8", f"run.dir={tmp_path / 'run'}", f"dpo.cache={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", "megarl.train_dpo", "+conf=hh", *files, *small, *batch],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert metrics["eval/accuracy"]["last"] == 1.0


def test_the_sentiment_preset_learns_kinder_answers(tmp_path: Path) -> None:
    command = ["megarl.train_ppo", "+conf=sentiment", f"run.dir={tmp_path}", "trainer.max_phases=10"]
    done = subprocess.run(
        [sys.executable, "-m", *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    score = json.loads((tmp_path / "summary.json").read_text())["metrics"]["eval/score"]
    assert abs(score["first"]) < 0.4, "cloned answers are as often pleased as not"
    assert score["last"] > 0.55
