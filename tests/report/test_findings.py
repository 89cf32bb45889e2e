"""Each finding is found in made-up bad runs and not in good ones; what it says has numbers, and keys that exist."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from megarl.config.algorithms import ALGORITHMS
from megarl.config.findings import FINDINGS
from megarl.config.leaf import leaves, optional_sections
from megarl.report.data import RunData
from megarl.report.findings import FINDERS, as_plain, find, line
from tests.report.series import found, made_up
from tests.report.series import line as rising

PPO: dict[str, Any] = {
    "trainer": {"max_phases": 20},
    "ppo": {"rollouts": 64, "objective": "clipped", "inner_epochs": 4},
    "rollout": {"n": 8, "max_new_tokens": 32},
}
SFT: dict[str, Any] = {"trainer": {"max_steps": 200}, "optim": {"lr": 1e-3}}
SCORES = rising(0.3, 0.9, 20)
UNLEARNED = [0.3, 0.31, 0.29, 0.3] * 5
SPREAD = [0.4] * 20


def phases(**series: Sequence[float]) -> RunData:
    """Phases of PPO; "a__b" stands for the metric a/b, and the score rises unless it is given."""
    named = {name.replace("__", "/"): values for name, values in series.items()}
    return made_up({"rollout/score": SCORES, "rollout/score_std": SPREAD, **named}, PPO)


def steps(**series: Sequence[float]) -> RunData:
    return made_up({name.replace("__", "/"): values for name, values in series.items()}, SFT, every=10)


def samples(follow: bool) -> list[Mapping[str, Any]]:
    """Twenty samples whose score is that of their length, or of nothing."""
    return [{"phase": 5, "response": "x" * n, "score": n / 20 if follow else n * 7 % 5} for n in range(1, 21)]


GROWS = {"rollout/score": SCORES, "rollout/score_std": SPREAD, "rollout/response_tokens": rising(10, 40, 20)}
HACKED = {"eval/score": rising(0.2, 0.9, 8), "eval/exact": rising(0.5, 0.1, 8), "rollout/score_std": [0.4] * 8}
SLOW = {"seconds": {"score": {"wall_s": 900}, "train": {"wall_s": 100}, "eval": {"wall_s": 9000}}}
QUICK = {"seconds": {"score": {"wall_s": 30}, "train": {"wall_s": 10}}}
BUSY = {"seconds": {"score": {"wall_s": 900}, "generate": {"wall_s": 3000}}}

UNSOLVED = {
    "eval/exact": [0.01, 0.02, 0.04, 0.03, 0.01, 0.0, 0.01, 0.0],  # of a hundred responses, one to four are right
    "eval/score": [0.01, 0.02, 0.04, 0.03, 0.01, 0.0, 0.01, 0.0],
    "eval/score_se": [0.01, 0.014, 0.02, 0.017, 0.01, 0.0, 0.01, 0.0],
}

BAD = {
    "score_collapsed": [
        phases(rollout__score=[0.63, 0.79, 0.86, 0.72, 0.93, 0.98, 0.06, 0.0, 0.0]),
        made_up({"eval/score": [0.2, 0.9, 0.8, 0.1, 0.1, 0.1]}, PPO),
        made_up({"eval/accuracy": [0.5, 0.9, 0.5, 0.5, 0.5]}, SFT),
    ],
    "kl_runaway": [
        phases(rollout__kl=rising(0, 60, 20), rollout__response_tokens=[20] * 20),
        phases(rollout__kl=[1.0] * 14 + [9.0] * 6, rollout__response_tokens=[20] * 20, rollout__score=UNLEARNED),
        phases(policy__approx_kl_max=[0.1, 0.2, 3.0, 0.4, 5.0, 7.0]),
        phases(policy__approx_kl_max=[1.5] * 8 + [0.2] * 12),
    ],
    "loss_diverges": [
        steps(train__loss=[4, 3, 2, 1.5, 1.2, 1.1, 1.1, 3, 3.5, 3.8, 3.9, 4, 4]),
        steps(train__loss=rising(2, 9, 12)),
        phases(value__loss=[0.1, 0.1, 0.2, 0.1, 0.1, 0.3, 1, 2, 5, 8, 9]),
    ],
    "gradients_explode": [
        steps(train__grad_norm=[1.0, 1.2] * 6 + [90, 200, 300, 800, 999]),
        steps(train__grad_norm=[1.0, 1.2] * 6 + [90] * 50),  # long ago
        steps(train__grad_norm=[1.0, 1.2] * 6 + [1e6] * 6 + [0.0] * 9),  # the model is saturated
    ],
    "gradients_dead": [
        steps(train__grad_norm=[2.0, 1.0] + [0.0] * 8),
        phases(train__grad_norm=[1.0, 0.9] * 6 + [1e-6] * 5),
    ],
    "entropy_collapsed": [
        phases(rollout__entropy=rising(1.0, 0.9, 4) + [0.01] * 16, rollout__score=UNLEARNED),
        phases(rollout__entropy=[1.0] * 4 + [0.01] * 16, rollout__score=[0.3] * 4 + [0.5] * 16),
    ],
    "no_learning": [
        phases(rollout__score=UNLEARNED),
        phases(rollout__score=[1.0] * 12, rollout__score_std=[0.0] * 12),
        steps(train__loss=[0.6931, 0.6932, 0.6930] * 5),
    ],
    "learning_rate_ended": [
        steps(train__lr=[*rising(1e-3, 1e-4, 10), *[1e-4] * 10]),
        steps(train__lr=[0.0] * 10),
    ],
    "reward_hacking": [made_up(HACKED, PPO)],
    "score_follows_length": [made_up(GROWS, PPO), made_up(GROWS, PPO, samples=samples(True))],
    "groups_without_spread": [
        phases(rollout__zero_spread_groups=[7.5] * 20, rollout__score=UNLEARNED),
        phases(rollout__zero_spread_groups=[18] * 20, rollout__prompts=[20] * 20, rollout__score=UNLEARNED),
    ],
    "value_explains_nothing": [
        phases(value__explained_variance=[-0.3, 0.0, -0.1] * 5),
        phases(value__explained_variance=[1e-4] * 12),  # scores that are far larger than a value may move
    ],
    "clipping_always": [
        phases(policy__clip_fraction=[0.1, 0.2, 0.6, 0.7, 0.6, 0.5, 0.7]),
        phases(value__clip_fraction=[0.9] * 8),
    ],
    "clipping_never": [phases(policy__clip_fraction=[0.0] * 8, train__optimizer_steps=[4] * 8)],
    "responses_cut": [phases(rollout__cut=rising(0.02, 0.9, 20)), phases(rollout__cut=[0.7] * 20)],
    "logprob_drift": [
        phases(rollout__logprob_drift=[0.01] * 6),
        phases(rollout__logprob_drift=[1e-7, 1e-7, 1e-7, 1e-6, 2e-4, 3e-4, 4e-4]),
    ],
    "reward_calls_failed": [
        phases(rollout__dropped=[0, 0, 20, 20, 20, 20, 20]),
        phases(rollout__failed_calls=[32] * 5),
    ],
    "evaluation_gap": [
        steps(eval__loss=[3, 2, 1.5, 1.8, 2.2, 2.6], train__loss=[3, 2, 1.5, 1.0, 0.5, 0.3]),
    ],
    "data_repeated": [
        made_up({"train/loss": rising(3, 1, 20)}, SFT, summary={"rows": {"read": 900, "there": 90}}),
    ],
    "waiting_for_rewards": [made_up({}, PPO, summary=SLOW)],
}

GOOD = {
    "score_collapsed": [
        phases(rollout__score=[0.49, 0.71, 0.87, 0.90, 0.07, 0.11, 0.23, 0.32, 0.36, 0.60, 0.93]),  # came back
        phases(rollout__score=[0.63, 0.79, 0.86, 0.72, 0.93, 0.98, 0.06, 0.0]),  # not long enough yet
        made_up({"eval/score": [0.9, 0.2, 0.2, 0.2]}, {**PPO, "checkpoint": {"best": {"mode": "min"}}}),
        made_up(UNSOLVED, {**PPO, "checkpoint": {"best": {"metric": "eval/exact", "mode": "max"}}}),
    ],
    "kl_runaway": [
        phases(rollout__kl=rising(0, 8, 20), rollout__response_tokens=[20] * 20),
        phases(policy__approx_kl_max=[0.1, 1.5, 0.3, 0.4, 0.2, 0.1]),
        phases(policy__approx_kl_max=[1.5] * 3 + [0.2] * 17),
        phases(rollout__kl=[1.0] * 14 + [9.0] * 6, rollout__response_tokens=[20] * 20),  # and the score rises
    ],
    "loss_diverges": [
        steps(train__loss=[4, 3, 2, 1.5, 1.2, 1.1, 1.3, 1.0, 1.2, 0.9, 1.1, 1.0, 1.1]),
        phases(train__loss=rising(-1, 5, 20)),  # the loss of a policy
        phases(value__loss=[0.06, 0.09, 0.15, 0.1, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01]),
        phases(value__loss=[0.001] * 5 + [0.08] * 10),  # the first scores above 0
    ],
    "gradients_explode": [
        steps(train__grad_norm=[1.0, 1.2] * 6 + [2, 90, 1, 2, 3]),
        steps(train__grad_norm=[1.0, 1.2] * 6 + [90] * 6 + [1, 2] * 5),  # it came back
        phases(train__grad_norm=[0.001] * 10 + [1.5] * 8),  # the first scores above 0
    ],
    "gradients_dead": [steps(train__grad_norm=rising(5, 0.05, 20))],
    "entropy_collapsed": [
        phases(rollout__entropy=rising(1.0, 0.001, 20), rollout__score_std=rising(0.4, 0.02, 20)),  # solved
        phases(rollout__entropy=rising(1.0, 0.2, 20), rollout__score=UNLEARNED),
    ],
    "no_learning": [
        phases(),
        phases(rollout__score=UNLEARNED[:9]),
        steps(train__loss=rising(0.6931, 0.68, 15)),
        steps(train__loss=[0.693] * 12, train__accuracy=rising(0.5, 0.6, 12)),
    ],
    "learning_rate_ended": [steps(train__lr=[1e-3] * 20), steps(train__lr=[*rising(1e-3, 1e-4, 20), 1e-4])],
    "reward_hacking": [
        made_up({**HACKED, "eval/exact": rising(0.1, 0.8, 8)}, PPO),
        made_up({**HACKED, "eval/score": [0.2] * 8}, PPO),
        made_up({**HACKED, "eval/exact": [0.5, 0.1, 0.6, 0.5, 0.4, 0.5, 0.6, 0.5]}, PPO),
    ],
    "score_follows_length": [
        made_up(GROWS, PPO, samples=samples(False)),
        made_up({**GROWS, "rollout/response_tokens": rising(10, 11, 20)}, PPO),
        made_up({**GROWS, "rollout/response_tokens": rising(40, 10, 20)}, PPO),  # shorter is better
    ],
    "groups_without_spread": [
        phases(rollout__zero_spread_groups=[8] * 20),  # it has learned: they are solved
        phases(rollout__zero_spread_groups=[4] * 20, rollout__score=UNLEARNED),
    ],
    "value_explains_nothing": [
        phases(value__explained_variance=[-0.3] * 5 + [0.05] * 10),
        phases(value__explained_variance=[-0.3] * 20, rollout__score_std=rising(0.4, 0.01, 20)),  # nothing is left
        phases(value__explained_variance=[0.006] * 12),  # slowly
        phases(value__explained_variance=[-0.3] * 7 + [0.05, 0.12, 0.16]),  # it has begun to
    ],
    "clipping_always": [
        phases(policy__clip_fraction=[0.9, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1]),
        made_up({"policy/clip_fraction": [0.6] * 8}, {**PPO, "ppo": {"ratio": "sequence"}}),
    ],
    "clipping_never": [
        phases(policy__clip_fraction=[0.0] * 8, train__optimizer_steps=[1] * 8),
        phases(policy__clip_fraction=[0.0, 0.001] * 8, train__optimizer_steps=[4] * 16),
    ],
    "responses_cut": [phases(rollout__cut=[1.0] * 20), phases(rollout__cut=rising(0.6, 0.1, 20))],
    "logprob_drift": [phases(rollout__logprob_drift=[1e-7, 2e-7] * 6)],
    "reward_calls_failed": [phases(rollout__dropped=[1, 0, 0, 2, 0, 0]), phases(rollout__failed_calls=[0, 1, 0, 1])],
    "evaluation_gap": [
        steps(eval__loss=[3, 2, 1.5, 1.55, 1.4, 1.45], train__loss=[3, 2, 1.5, 1.0, 0.5, 0.3]),
        steps(eval__loss=[3, 2, 1.5, 1.8, 2.2, 2.6], train__loss=[3, 2, 1.5, 1.8, 2.5, 3.0]),  # both rise
    ],
    "data_repeated": [
        made_up({"train/loss": rising(3, 1, 20)}, SFT, summary={"rows": {"read": 90, "there": 90}}),
        made_up({"eval/loss": rising(3, 1, 20)}, SFT, summary={"rows": {"read": 900, "there": 90}}),
        made_up({"eval/score": rising(0, 1, 20)}, SFT, summary={"rows": {"read": 900, "there": 90}}),
    ],
    "waiting_for_rewards": [made_up({}, PPO, summary=QUICK), made_up({}, PPO, summary=BUSY)],
}


def test_every_finding_has_a_name_that_the_configuration_knows_and_both_kinds_of_runs() -> None:
    assert tuple(FINDERS) == FINDINGS == tuple(BAD) == tuple(GOOD)


@pytest.mark.parametrize("name", FINDINGS)
def test_a_bad_run_has_the_finding_and_says_why_and_what_to_try(name: str) -> None:
    for data in BAD[name]:
        finding = found(name, data)
        assert finding is not None, data.rows[-1:]
        assert finding.name == name
        assert finding.severity in ("problem", "warning")
        assert re.search(r"\d", finding.evidence), "evidence has numbers"
        assert finding.evidence.endswith(".")
        assert finding.cause.endswith(".")
        assert "\n" not in line(finding)
        if finding.steps is not None:
            steps_there = [int(row["step"]) for row in data.rows]
            assert steps_there[0] <= finding.steps[0] <= finding.steps[1] <= steps_there[-1]


@pytest.mark.parametrize("name", FINDINGS)
def test_a_good_run_does_not_have_it(name: str) -> None:
    for data in GOOD[name]:
        assert found(name, data) is None


def known_keys() -> set[str]:
    trees = [algorithm.config for algorithm in ALGORITHMS.values()]
    return {leaf.key for tree in trees for leaf in leaves(tree)} | {
        section.key for tree in trees for section in optional_sections(tree)
    }


def test_remedies_name_keys_that_exist() -> None:
    known = known_keys()
    sections = {key.partition(".")[0] for key in known}
    for name, runs in BAD.items():
        for data in runs:
            finding = found(name, data)
            assert finding is not None
            words = re.findall(r"\b([a-z_]+(?:\.[a-z_]+)+)\b", f"{finding.remedy} {finding.cause} {finding.evidence}")
            keys = {word for word in words if word.partition(".")[0] in sections}
            assert keys <= known, (name, keys - known)


def test_an_empty_run_has_no_finding_and_a_number_that_is_not_finite_is_left_out() -> None:
    assert find(made_up({})) == []
    assert find(phases(train__grad_norm=[float("nan")] * 20)) == []


def test_problems_come_first_and_only_those_that_are_asked_for_are_looked_for() -> None:
    data = phases(
        rollout__score=[0.5] * 9 + [0.9] * 5 + [0.0] * 6,
        rollout__cut=[0.7] * 20,
        rollout__logprob_drift=[0.01] * 20,
    )
    names = [finding.name for finding in find(data)]
    assert names == ["score_collapsed", "responses_cut", "logprob_drift"]
    assert [finding.name for finding in find(data, ["logprob_drift"])] == ["logprob_drift"]


def test_a_finding_is_plain_values_for_the_file() -> None:
    (plain,) = as_plain(find(phases(rollout__cut=[0.7] * 20)))
    assert plain["name"] == "responses_cut"
    assert plain["steps"] == [1, 20]
    assert plain["metrics"] == ["rollout/cut", "rollout/response_tokens"]


def test_drift_of_bf16_is_no_finding_at_a_size_that_is_one_in_float32() -> None:
    series = {"rollout/logprob_drift": [0.01] * 6}
    assert found("logprob_drift", made_up(series, {"trainer": {"precision": "bf16"}})) is None
    assert found("logprob_drift", made_up(series, {"trainer": {"precision": "fp32"}})) is not None
