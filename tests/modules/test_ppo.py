"""What follows from the settings of PPO: which models there are, who warms up, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarl.config.ppo import PPOConfig, SeparateCriticConfig
from megarl.config.ppo_sections import DynamicSamplingConfig
from megarl.config.sections.reward import RewardCallsConfig
from megarl.errors import RewardError
from megarl.experience.collection import Scored
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


def scored(greedy: list[float | None], *scores: float | None) -> Any:
    """A phase of two prompts as it comes from generation and scoring."""
    sampled = [replace(one, sample_id=0) for one in RESPONSES]
    return lambda prompts, first: Scored(sampled, Scores(list(scores)), RESPONSES if greedy else [], greedy)


def test_a_phase_in_which_nothing_is_left_to_train_on_ends_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(
        ppo__advantages="remax", critic__kind="none", reward__calls=RewardCallsConfig(on_error="drop"), ppo__rollouts=2
    )
    monkeypatch.setattr(module, "_respond", scored([0.5, 0.5], 1.0, None))
    found = module._collect()
    assert found.greedy is not None
    assert (found.scores, found.greedy.scores, found.unscored) == ([1.0], [0.5], 1)
    monkeypatch.setattr(module, "_respond", scored([None, 0.5], 1.0, None))
    with refused(RewardError, key="reward.fn", value="rewards.py:score", names=("2", "phase 1")):
        module._collect()
    module.config.reward.fn, module.config.reward.model = None, "runs/rm"
    monkeypatch.setattr(module, "_respond", scored([], None, None))
    with refused(RewardError, key="reward.model", value="runs/rm", offers={"reward.calls.on_error": ["error"]}):
        module._collect()


def test_a_phase_without_spread_at_its_limit_ends_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(
        ppo__advantages="grpo", rollout__n=2, ppo__rollouts=4, ppo__dynamic_sampling=DynamicSamplingConfig(limit=2.0)
    )

    def respond(prompts: list[Any], first: int) -> Scored:
        rollouts = [
            Rollout(one, sample, [1], [2], [-1.0], "eos") for one in range(first, len(prompts)) for sample in (0, 1)
        ]
        return Scored(rollouts, Scores([1.0] * len(rollouts)))

    monkeypatch.setattr(module, "_respond", respond)
    with refused(RewardError, key="ppo.dynamic_sampling.limit", value=2.0, names=("4 prompts", "phase 1")):
        module._collect()
