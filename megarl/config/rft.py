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
        4,
        "Number of passes over the best responses of a phase; the required quantile rises from rft.start_percentile "
        "to rft.end_percentile.",
        at_least=1,
    )
    start_percentile: float = leaf(
        0.7,
        "In the first pass, responses whose score is below this quantile (0 to 1) of the distinct responses to their "
        "prompt are left out. The lowest score of a prompt is always left out; if all its scores are equal, they are "
        "kept only if they reach the phase's mean.",
        at_least=0,
        at_most=1,
    )
    end_percentile: float = leaf(
        0.95, "Quantile in the last pass. It rises linearly from rft.start_percentile.", at_least=0, at_most=1
    )

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
    """Require rollout.n of 2 or more."""
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
