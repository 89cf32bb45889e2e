"""What is said to try is something that the run can do, and does not do yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megarl.config.algorithms import ALGORITHMS
from megarl.report.remedies import at_most, first_remedies, remedies
from tests.report.made_up import settings
from tests.report.series import found, made_up
from tests.report.series import line as slope


def said(config: Mapping[str, Any], *texts: str) -> str:
    return remedies(made_up({}, config), *texts)


def test_the_first_one_begins_a_sentence_unless_it_is_a_key() -> None:
    assert said({}, "a lower optim.lr", "more data") == "A lower optim.lr; more data"
    assert said({}, "ppo.clip_value=null", "more data") == "ppo.clip_value=null; more data"


def test_a_remedy_with_a_key_that_the_algorithm_does_not_have_is_left_out() -> None:
    texts = "a lower optim.lr", "a lower ppo.kl_coef", "a larger trainer.max_steps", "read samples.jsonl"
    assert said(settings("sft"), *texts) == "A lower optim.lr; a larger trainer.max_steps; read samples.jsonl"
    assert said(settings("ppo"), *texts) == "A lower optim.lr; a lower ppo.kl_coef; read samples.jsonl"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ppo__clip_value", None, "ppo.clip_value=null"),
        ("optim__clip_grad", 1, "optim.clip_grad=1.0"),
        ("critic__kind", "separate", "critic.kind=separate"),
        ("ppo__correction", {"low": 0.0}, "ppo.correction={} weights tokens"),
        ("ppo__whiten_advantages", False, "ppo.whiten_advantages=false"),
    ],
)
def test_a_value_that_the_run_has_is_left_out(key: str, value: Any, text: str) -> None:
    assert said(settings("ppo", **{key: value}), text, "more data") == "More data"
    assert said(settings("ppo", **{key: "other"}), text, "more data") == f"{text}; more data"


def test_what_is_left_out_comes_back_where_nothing_is_left() -> None:
    assert said(settings("sft"), "a lower ppo.kl_coef") == "A lower ppo.kl_coef"


@pytest.mark.parametrize(
    ("present", "expected"), [(None, ("ppo.stop_at_kl=0.05",)), (0.2, ("ppo.stop_at_kl=0.05",)), (0.02, ())]
)
def test_a_limit_is_advised_where_it_is_smaller(present: float | None, expected: tuple[str, ...]) -> None:
    assert at_most(made_up({}, settings("ppo", ppo__stop_at_kl=present)), "ppo.stop_at_kl", 0.05) == expected


def test_the_terminal_shows_the_first_ones() -> None:
    assert first_remedies("One; two; three") == "One; two"
    assert first_remedies("One") == "One"


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_loss_that_rises_names_keys_of_its_algorithm(algorithm: str) -> None:
    finding = found("loss_diverges", made_up({"train/loss": slope(2, 9, 12)}, settings(algorithm)))
    assert finding is not None
    assert finding.remedy.startswith("A lower optim.lr; ")
    assert ("ppo." in finding.remedy) == (algorithm in ("ppo", "grpo"))


@pytest.mark.parametrize(
    ("rate", "kind", "direction"), [(1e-5, "adamw", "higher"), (0.3, "adamw", "lower"), (0.3, "sgd", "higher")]
)
def test_a_loss_that_stays_asks_for_a_lower_rate_where_it_is_high(rate: float, kind: str, direction: str) -> None:
    config = settings("rm", optim__lr=rate, optim__kind=kind)
    finding = found("no_learning", made_up({"train/loss": [0.6931, 0.6932, 0.6930] * 5}, config))
    assert finding is not None
    assert finding.remedy.startswith(f"A {direction} optim.lr")


def test_a_penalty_that_outweighs_the_score_is_the_cause_of_a_score_that_does_not_rise() -> None:
    series = {
        "rollout/score": [0.3, 0.31, 0.29, 0.3] * 5,
        "rollout/score_std": [0.4] * 20,
        "rollout/kl": [0.5] * 20,
    }
    for coefficient, first in ((5.0, "A lower ppo.kl_coef"), (0.05, "A higher optim.lr")):
        finding = found("no_learning", made_up(series, settings("ppo", ppo__kl_coef=coefficient, optim__lr=1e-5)))
        assert finding is not None
        assert finding.remedy.startswith(first)
        assert ("penalty" in finding.cause) == (coefficient == 5.0)
