"""The configuration of `python -m megarl.train_rft`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.leaf import Section, leaf, section
from megarl.config.offers import Refusal, Rule
from megarl.config.trees import PhaseTree


@dataclass
class RFTSettings(Section):
    """Rejection-sampling fine-tuning."""

    prompts: int | None = leaf(None, "Number of prompts per phase (null: all of them).", at_least=1, at_most=2**24)
    improve_steps: int = leaf(
        4, "Number of times that a phase's responses are trained on, each time fewer of them.", at_least=1
    )
    start_percentile: float = leaf(
        0.7,
        "Responses whose score is below this quantile of the scores of their prompt are left out at first.",
        at_least=0,
        at_most=1,
    )
    end_percentile: float = leaf(0.95, "The same quantile in the last of rft.improve_steps.", at_least=0, at_most=1)

    def check(self) -> None:
        """Refuse a selection that grows less strict."""
        if self.start_percentile > self.end_percentile:
            raise Refusal(
                f"rft.start_percentile={self.start_percentile:g} is above rft.end_percentile={self.end_percentile:g}, "
                "which it rises to: swap them",
                key="rft.start_percentile",
                value=self.start_percentile,
            )


def responses_are_compared(config: Any, world_size: int) -> None:
    """There are several responses to a prompt to select among."""
    if config.rollout.n < 2:
        raise Refusal(
            f"rollout.n={config.rollout.n} leaves nothing to select among the responses to a prompt: use rollout.n=32",
            key="rollout.n",
            value=config.rollout.n,
        )


@dataclass
class RFTConfig(PhaseTree):
    """The keys of rejection-sampling fine-tuning."""

    rules: ClassVar[tuple[Rule, ...]] = (*PhaseTree.rules, responses_are_compared)

    rft: RFTSettings = section(RFTSettings)
