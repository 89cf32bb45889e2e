"""Definitions of metrics are those of docs/metrics.md, of the algorithm that logged them."""

from __future__ import annotations

import pytest

from megarl.report.definitions import Definition, definitions, find_definition


@pytest.mark.parametrize(
    ("metric", "algorithm", "begins"),
    [
        ("train/loss", "sft", "SFT: mean negative log-likelihood"),
        ("train/loss", "ilql", "`loss_q + loss_v"),
        ("train/loss", "ppo", "Policy loss"),
        ("train/loss", "grpo", "Policy loss"),
        ("train/loss", "dpo", "Mean loss of the pairs"),
        ("train/loss", "kto", "Mean loss of the responses"),
        ("train/loss", "rm", "Mean loss."),
        ("eval/loss", "sft", "SFT: mean negative"),
        ("eval/loss", "orpo", "DPO, KTO, ORPO and CPO"),
        ("eval/loss", "rm", "Reward models"),
        ("eval/score", "grpo", "Entry points that generate"),
        ("eval/score@temperature=0.7", "ppo", "Entry points that generate"),
        ("eval/pass@4", "ppo", "The same where every score is 0 or 1"),
        ("eval/best@16@temperature=0.7", "ppo", "With `eval.n` above 1"),
        ("eval/pass@4_se", "ppo", "Its standard error."),
        ("eval/optimality", "ppo", "Mean of `metric.fn`"),
        ("rollout/score/length/short", "ppo", "With several functions"),
        ("rollout/entropy", "rft", "Mean entropy of the policy"),
        ("perf/mfu", "", "Model FLOPs utilisation"),
    ],
)
def test_a_metric_has_the_definition_of_its_algorithm(metric: str, algorithm: str, begins: str) -> None:
    found = find_definition(metric, algorithm)
    assert found is not None
    assert found.text.startswith(begins)


def test_a_metric_of_the_users_code_has_no_definition() -> None:
    assert find_definition("mine/own", "ppo") is None


def test_every_entry_is_read() -> None:
    names = {name for each in definitions() for name in each.names}
    assert {"train/lr", "value/error", "correction/ess", "perf/peak_memory_gb", "eval/vote_se"} <= names


@pytest.mark.parametrize("each", definitions(), ids=lambda each: f"{each.names[0]} {'+'.join(sorted(each.algorithms))}")
def test_an_entry_has_a_definition_a_unit_what_is_normal_and_a_remedy(each: Definition) -> None:
    assert all((each.text, each.unit, each.normal, each.remedy)), each


def test_an_entry_is_read_part_by_part() -> None:
    found = find_definition("policy/clip_fraction", "ppo")
    assert found is not None
    assert found.algorithms == {"ppo", "grpo"}
    assert found.unit == "share of tokens"
    assert found.text.startswith("Tokens whose clipped term")
    assert found.formula.startswith("`mean over tokens of")
    assert found.normal.startswith("Up to 0.3")
    assert "optim.lr" in found.remedy

