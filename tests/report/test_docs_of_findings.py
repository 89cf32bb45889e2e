"""docs/findings.md says what the code does: every finding, the worst first within its part, and its thresholds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megarl.config.findings import FINDINGS
from megarl.report import of_policies, of_scores, of_training

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
ROWS = dict(re.findall(r"^### `([a-z_]+)`\n\n(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
THRESHOLDS = {
    "no_learning": (of_scores.LOSS_FLAT, 0.002, ".2 %"),
    "score_follows_length": (of_scores.LENGTH_GROWTH, 1.3, "30 %"),
    "reward_hacking": (of_scores.HACKED_CORRELATION, -0.5, "-.5"),
    "groups_without_spread": (of_policies.EQUAL_GROUPS, 0.8, "80 %"),
    "kl_runaway": (of_policies.FAR, 1.0, "1 nat"),
    "entropy_collapsed": (of_policies.ENTROPY_LEFT, 0.05, "5 %"),
    "clipping_always": (of_policies.CLIPPED, 0.4, "40 %"),
    "value_explains_nothing": (of_policies.EXPLAINS_NOTHING, 0.001, ".001"),
    "responses_cut": (of_policies.CUT, 0.5, "Half"),
    "logprob_drift": (of_policies.DRIFT["bf16"], 0.05, ".05 in bf16"),
    "loss_diverges": (of_training.LOSS_RISE, 1.5, "1.5 times"),
    "gradients_explode": (of_training.EXPLODED, 30, "30 times"),
    "evaluation_gap": (of_training.GAP, 0.05, "5 %"),
    "data_repeated": (of_training.PASSES, 4, "Four passes"),
    "reward_calls_failed": (of_training.DROPPED, 0.05, "5 %"),
    "waiting_for_rewards": (of_training.WAITED, 0.4, "40 %"),
}


def test_every_finding_has_an_entry() -> None:
    assert set(ROWS) == set(FINDINGS)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_an_entry_has_the_threshold_of_the_code(name: str) -> None:
    present, documented, text = THRESHOLDS[name]
    assert present == documented, "change the page, and this line"
    assert text in ROWS[name]
