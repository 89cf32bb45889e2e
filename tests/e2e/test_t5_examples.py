"""examples/t5_summaries and examples/t5_sentiment: their commands, for a few steps each, and what their data say."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.e2e.runs import metrics
from tests.e2e.test_instruct_example import run_step, words_of
from tests.worlds import Worlds

EXAMPLES = Path(__file__).parents[2] / "examples"


def module_of(example: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / example)))


def test_a_t5_clones_summaries_and_is_trained_by_the_reward(worlds: Worlds, tmp_path: Path) -> None:
    entry, words = words_of(EXAMPLES / "t5_summaries" / "ppo.sh", tmp_path)
    shorter = ["clone.steps=4", "trainer.max_phases=1", "ppo.rollouts=32", "ppo.inner_epochs=1"]
    worlds.run(1, run_step, tmp_path, entry, [*words, *shorter, "trainer.eval_every=1", "rollout.max_new_tokens=8"])
    run = tmp_path / "runs" / "t5_summaries"
    assert len(metrics(run, "policy/loss", "value/loss")) == 1
    assert len(metrics(run, "eval/score")) == 2


def test_a_t5_learns_values_of_rated_answers_and_is_evaluated_with_each_beta(worlds: Worlds, tmp_path: Path) -> None:
    entry, words = words_of(EXAMPLES / "t5_sentiment" / "ilql.sh", tmp_path)
    shorter = ["trainer.max_steps=6", "trainer.eval_every=6", "eval.n=1"]
    worlds.run(1, run_step, tmp_path, entry, [*words, *shorter, "rollout.max_new_tokens=8"])
    run = tmp_path / "runs" / "t5_sentiment"
    losses = metrics(run, "train/loss", "train/loss_q")
    assert losses[-1][0] < losses[0][0]
    assert len(metrics(run, *(f"eval/score@beta={beta}" for beta in (0, 1, 4)))) > 0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("fire in Oslo", 1),
        ("fire in Rome", (2 / 3 + 1 / 2) / 2),
        ("fire", (2 / 4 + 0) / 2),
        ("fire in Oslo in Oslo", (6 / 8 + 4 / 6) / 2),
        ("flood at Cork", 0),
        ("", 0),
    ],
)
def test_overlap_is_the_mean_of_rouge_1_and_rouge_2(output: str, expected: float) -> None:
    (found,) = module_of("t5_summaries/tasks.py").overlap(outputs=[output], summary=["fire in Oslo"])
    assert found == pytest.approx(expected)


def test_the_wanted_summary_is_of_the_only_misfortune() -> None:
    tasks = module_of("t5_summaries/tasks.py")
    for report in tasks.reports():
        event, place = report["summary"].split(" in ")
        (told,) = (sentence for sentence in tasks.MISFORTUNES if sentence in report["prompt"])
        assert tasks.MISFORTUNES[told] == event
        assert f"In {place} {told}." in report["prompt"]


def test_held_out_reports_are_not_learned_from() -> None:
    tasks = module_of("t5_summaries/tasks.py")
    learned = {report["prompt"] for report in [*tasks.reports(), *tasks.mixed_summaries()]}
    assert not learned & {report["prompt"] for report in tasks.held_out_reports()}


def test_a_third_of_the_summaries_to_clone_are_the_wanted_ones() -> None:
    tasks = module_of("t5_summaries/tasks.py")
    wanted = {report["prompt"]: report["summary"] for report in tasks.reports()}
    cloned = tasks.mixed_summaries()
    assert sum(wanted[record["prompt"]] == record["completion"] for record in cloned) == len(cloned) / 3
