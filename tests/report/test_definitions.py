"""Definitions of metrics are those of docs/metrics.md, of the algorithm that logged them."""

from __future__ import annotations

import pytest

from megarl.report import of_policies, of_scores, of_training
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


@pytest.mark.parametrize(
    ("metric", "algorithm", "said"),
    [
        ("policy/clip_fraction", "ppo", f"{of_policies.CLIPPED:g} or more"),
        ("value/clip_fraction", "ppo", f"{of_policies.VALUES_CLIPPED:g} or more"),
        ("value/loss", "ppo", f"{of_training.VALUE_LOSS_RISE:g} times what it was at first"),
        ("policy/approx_kl_max", "ppo", f"Above {of_policies.STEP_FAR:g} in three of five phases"),
        ("rollout/kl", "ppo", f"Above {of_policies.FAR:g} nat per token"),
        ("rollout/entropy", "ppo", f"Below {of_policies.ENTROPY_LEFT:.0%}".replace("%", " %")),
        ("rollout/zero_spread_groups", "grpo", f"{of_policies.EQUAL_GROUPS:.0%} of the prompts".replace("%", " %")),
        ("rollout/cut", "ppo", f"{of_policies.CUT:g} or more"),
        ("rollout/logprob_drift", "ppo", "Above {fp32:g} in float32 or {bf16:g} in bf16".format(**of_policies.DRIFT)),
        ("rollout/response_tokens", "ppo", f"{of_scores.LENGTH_GROWTH - 1:.0%} longer".replace("%", " %")),
        ("rollout/dropped", "ppo", f"{of_training.DROPPED:.0%} of the responses".replace("%", " %")),
        ("train/grad_norm", "sft", f"{of_training.EXPLODED:g} times as much and above {of_training.ABOVE_CLIPPING:g}"),
        ("eval/loss", "sft", f"{of_training.GAP:.0%} above its best".replace("%", " %")),
    ],
)
def test_a_remedy_begins_where_the_finding_does(metric: str, algorithm: str, said: str) -> None:
    found = find_definition(metric, algorithm)
    assert found is not None
    assert found.remedy.startswith(said)


def test_an_entry_is_read_part_by_part() -> None:
    found = find_definition("policy/clip_fraction", "ppo")
    assert found is not None
    assert found.algorithms == {"ppo", "grpo"}
    assert found.unit == "share of tokens"
    assert found.text.startswith("Tokens whose clipped term")
    assert found.formula.startswith("`mean over tokens of")
    assert found.normal.startswith("Up to 0.3")
    assert "optim.lr" in found.remedy
