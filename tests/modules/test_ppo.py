"""What follows from the settings of PPO: which models there are, who warms up, and what is warned of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.config.ppo import PPOConfig, SeparateCriticConfig
from megarl.errors import RewardError
from megarl.models.exchange.pretrained import Sources
from megarl.modules.ppo import PPO
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

Make = Callable[..., PPO]
RESPONSES = [Rollout(0, 0, [1], [2], [-1.0], "eos"), Rollout(1, 0, [1], [3], [-1.0], "eos")]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "prompts.txt").write_text("a\nb\n")

    def module(**values: Any) -> PPO:
        config = PPOConfig()
        config.data.train, config.reward.fn = [str(tmp_path / "prompts.txt")], "rewards.py:score"
        for key, value in values.items():
            section, _, name = key.partition("__")
            setattr(getattr(config, section), name, value)
        return PPO(config, ByteTokenizer())

    return module


@pytest.mark.parametrize(
    ("advantages", "critic", "heads"),
    [
        ("gae", "shared", {"policy": ("lm", "value"), "reference": ("lm",)}),
        ("gae", "separate", {"policy": ("lm",), "critic": ("value",), "reference": ("lm",)}),
        ("grpo", "none", {"policy": ("lm",), "reference": ("lm",)}),
        ("remax", "shared", {"policy": ("lm",), "reference": ("lm",)}),
        ("rloo", "separate", {"policy": ("lm",), "reference": ("lm",)}),
    ],
)
def test_there_is_a_critic_where_values_are_needed(
    advantages: str, critic: str, heads: dict[str, tuple[str, ...]], make: Make
) -> None:
    module = make(ppo__advantages=advantages, critic__kind=critic)
    roles = PPO.roles(module.config, module.vocab_size, Sources())
    assert {role.name: role.heads for role in roles} == heads


def test_only_a_critic_of_its_own_warms_up(make: Make) -> None:
    warm_up = SeparateCriticConfig(warmup_phases=3)
    assert make(critic__kind="separate", critic__separate=warm_up).warmup_phases == 3
    alone = make(ppo__advantages="grpo", rollout__n=2, critic__kind="separate", critic__separate=warm_up)
    assert alone.warmup_phases == 0


@pytest.mark.parametrize(
    ("stats", "groups", "warned"),
    [
        ({"rollout/score_std": 0.0}, 4, True),
        ({"rollout/score_std": 1.0}, 4, False),
        ({"rollout/score_std": 1.0, "rollout/zero_spread_groups": 4.0}, 4, True),
        ({"rollout/score_std": 1.0, "rollout/zero_spread_groups": 3.0}, 4, False),
    ],
)
def test_phases_that_say_nothing_are_warned_of_once(
    stats: dict[str, float], groups: int, warned: bool, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    module = make(ppo__advantages="grpo", rollout__n=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            module._watch_scores({"rollout/score": 1.0, **stats}, groups)
    assert len(caplog.records) == warned


def test_a_phase_in_which_nothing_is_left_to_train_on_ends_the_run(make: Make) -> None:
    module = make(ppo__advantages="remax", critic__kind="none", reward__on_error="drop")
    assert module.keep_scored(RESPONSES, Scores([1.0, None]), [0.5, 0.5])[1:] == ([1.0], [0.5])
    with refused(RewardError, key="reward.fn", value="rewards.py:score", names=("2", "phase 1")):
        module.keep_scored(RESPONSES, Scores([1.0, None]), [None, 0.5])
    module.config.reward.fn, module.config.reward.model = None, "runs/rm"
    with refused(RewardError, key="reward.model", value="runs/rm", offers={"reward.on_error": ["error"]}):
        module.keep_scored(RESPONSES, Scores([None, None]))
