"""The table of algorithms. What sets one apart is declared here, once.

The command line, the Python interface, the plan, `--help` and docs/configuration.md read this table; tests compare it
with the files that cannot (launchers, pyproject.toml). docs/design.md lists what a new algorithm needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from megarl.config.generate import GenerateConfig
from megarl.config.ilql import ILQLConfig
from megarl.config.ppo import PPOConfig
from megarl.config.rft import RFTConfig
from megarl.config.sft import SFTConfig

LearnsFrom = Literal["prompts", "samples", "rewarded samples"]
_GROUPS = {"model": "tiny", "parallel": "single"}
_TRAINING_GROUPS = {**_GROUPS, "trainer/exp_manager": "none", "logger": "default"}


@dataclass(frozen=True)
class EntryPoint:
    """A program that is configured by a tree: `python -m megarl.PROGRAM [key=value ...]`.

    Values come from the tree, then `groups`, then `defaults`, then presets, then the command line; later ones win.

    Args:
        name: what the entry point is called in megarl.
        config: the tree of its configuration. Several entry points may share one.
        about: one sentence for `--help` and docs/configuration.md.
        groups: option of each configuration group that is chosen unless the command line chooses another.
        defaults: values by dotted key, where they differ from those of the tree and of the groups.
    """

    name: str
    _: KW_ONLY
    config: type
    about: str
    groups: Mapping[str, str] = field(default_factory=_GROUPS.copy)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """The module of megarl that is run, and the name of the primary configuration."""
        return self.name


@dataclass(frozen=True)
class Algorithm(EntryPoint):
    """An entry point that trains: `python -m megarl.train_NAME`.

    Args:
        module: the class that trains, as package.module:Class. It is made with the configuration, the tokenizer and
            the functions that take the place of those that the configuration names.
        learns_from: what `megarl.train` must be given for it. Of several algorithms that learn from the same, it
            runs the first one unless its `config` is of another.
        unit: what one training step is called, "step" or "phase".
    """

    _: KW_ONLY
    module: str
    learns_from: LearnsFrom
    unit: str = "step"
    groups: Mapping[str, str] = field(default_factory=_TRAINING_GROUPS.copy)

    @property
    def program(self) -> str:
        """Name of its program, `train_NAME`, which is also the name of its primary configuration."""
        return f"train_{self.name}"


_LEARNED_WEIGHTS_LR = 1e-5  # for weights that have learned; small models from nothing want a hundred times that

_PPO_DEFAULTS = {
    "optim.lr": _LEARNED_WEIGHTS_LR,
    "checkpoint.every": 10,
    "checkpoint.metric": "eval/score",
    "checkpoint.mode": "max",
}

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "sft",
            config=SFTConfig,
            module="megarl.modules.sft:SFT",
            about="Supervised fine-tuning of a GPT on text, completions or conversations.",
            learns_from="samples",
            groups={**_TRAINING_GROUPS, "data": "demo", "trainer": "laptop"},
        ),
        Algorithm(
            "ppo",
            config=PPOConfig,
            module="megarl.modules.ppo:PPO",
            about="Proximal policy optimisation of a GPT on prompts and a reward function.",
            learns_from="prompts",
            unit="phase",
            defaults=_PPO_DEFAULTS,
        ),
        Algorithm(
            "grpo",
            config=PPOConfig,
            module="megarl.modules.ppo:PPO",
            about="Group relative policy optimisation: PPO whose advantages compare the responses to a prompt, without "
            "a critic.",
            learns_from="prompts",
            unit="phase",
            defaults={
                **_PPO_DEFAULTS,
                "ppo.advantages": "grpo",
                "critic.kind": "none",
                "rollout.n": 8,
                "ppo.kl_in": "loss",  # a KL in the scores would be divided by the deviation of a group, too
                "ppo.kl_kind": "k3",
            },
        ),
        Algorithm(
            "rft",
            config=RFTConfig,
            module="megarl.modules.rft:RFT",
            about="Rejection-sampling fine-tuning of a GPT on prompts and a reward function.",
            learns_from="prompts",
            unit="phase",
            defaults={
                "optim.lr": _LEARNED_WEIGHTS_LR,
                "checkpoint.every": 5,
                "checkpoint.metric": "eval/score",
                "checkpoint.mode": "max",
            },
        ),
        Algorithm(
            "ilql",
            config=ILQLConfig,
            module="megarl.modules.ilql:ILQL",
            about="Implicit language Q-learning: a GPT learns from samples with rewards, without generating any while "
            "it trains.",
            learns_from="rewarded samples",
            defaults={
                "optim.lr": _LEARNED_WEIGHTS_LR,
                "checkpoint.metric": "eval/score",
                "checkpoint.mode": "max",
            },
        ),
    )
}
"""Algorithms by name, in the order in which they are documented."""

GENERATE = EntryPoint("generate", config=GenerateConfig, about="Responses of a trained model to prompts, or a chat.")


def entry_points() -> dict[str, EntryPoint]:
    """Every entry point that is configured by a tree, by name: the algorithms, and `generate`."""
    return {**ALGORITHMS, GENERATE.name: GENERATE}


def entry_point(name: str) -> EntryPoint:
    """Return the entry point of a name, such as `ppo` or `generate`."""
    return entry_points()[name]
