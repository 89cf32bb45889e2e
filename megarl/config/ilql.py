"""The configuration of `python -m megarl.train_ilql`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megarl.config.leaf import Section, leaf, section
from megarl.config.offers import Rule
from megarl.config.rules import sequences_fit_model
from megarl.config.sections.data import OfflineDataConfig
from megarl.config.sections.evaluation import GuidedEvalConfig
from megarl.config.sections.rollout import GuidedRolloutConfig
from megarl.config.sections.trainer import TrainerConfig
from megarl.config.trees import GeneratingTree


@dataclass
class ILQLSettings(Section):
    """Implicit language Q-learning."""

    tau: float = leaf(
        0.7,
        "Expectile of the target Q values of the actions taken that V regresses to: above 0.5, actions better than V "
        "weigh more.",
        above=0,
        below=1,
    )
    gamma: float = leaf(0.99, "Discount of later rewards.", at_least=0, at_most=1)
    cql_scale: float = leaf(
        0.1, "Weight of the conservative (CQL) loss, which keeps Q low for tokens that are not in the data.", at_least=0
    )
    awac_scale: float = leaf(1.0, "Weight of the policy loss, the cross entropy of the output tokens.", at_least=0)
    awac_beta: float = leaf(
        0.0,
        "Each token's policy loss is multiplied by exp(awac_beta * (Q - V)) (0: all tokens weigh the same).",
        at_least=0,
    )
    two_qs: bool = leaf(
        True,
        "Train two Q heads, and use the smaller of the values of their target heads for V and for generation; "
        "otherwise one.",
    )
    target_alpha: float = leaf(
        0.001,
        "Share of the difference by which the target heads move towards the Q heads, every ilql.target_every steps.",
        above=0,
        at_most=1,
    )
    target_every: int = leaf(5, "Optimizer steps between moves of the target heads.", at_least=1)
    pack: bool = leaf(
        True, "Put several short samples into one sequence of a forward pass, without attention between them."
    )

    @property
    def q_heads(self) -> int:
        """Number of Q heads."""
        return 2 if self.two_qs else 1


@dataclass
class ILQLConfig(GeneratingTree):
    """The keys of implicit language Q-learning."""

    rules: ClassVar[tuple[Rule, ...]] = (*GeneratingTree.rules, sequences_fit_model)

    data: OfflineDataConfig = section(OfflineDataConfig)
    rollout: GuidedRolloutConfig = section(GuidedRolloutConfig)
    eval: GuidedEvalConfig = section(GuidedEvalConfig)
    ilql: ILQLSettings = section(ILQLSettings)
    trainer: TrainerConfig = section(TrainerConfig)
