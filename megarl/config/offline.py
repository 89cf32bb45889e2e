"""Sections of the entry points that learn from reward-labelled samples: data, ILQL, and how it generates."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import leaf, section
from megarl.config.rl import SOURCES, TOO_LONG, EvalConfig, PromptDataConfig, RolloutConfig, SweepConfig


@dataclass
class OfflineDataConfig(PromptDataConfig):
    """Which samples are learnt from, and which prompts evaluations answer."""

    train: list[str] = leaf([], SOURCES.format("samples with rewards"))
    eval: list[str] = leaf([], "prompts of evaluations, likewise (empty: no evaluation)")
    samples_key: str = leaf(
        "samples", "key of the sample in a record: a text, [prompt, output], or a longer dialogue of such turns"
    )
    rewards_key: str = leaf("rewards", "key of a sample's reward in a record: a number, or one for each output")
    seq_length: int = leaf(128, "maximum number of tokens per sample", at_least=2, at_most=2**31 - 1)
    too_long: str = leaf(
        "truncate", "what happens to samples longer than seq_length: cut at the end, left out or an error", TOO_LONG
    )
    shuffle: bool = leaf(True, "draw samples in a new seeded order every epoch")
    cache: str | None = leaf(
        "~/.cache/megarl", "folder in which tokenised samples are kept for later runs (null: they are not)"
    )


@dataclass
class GuidedRolloutConfig(RolloutConfig):
    """How responses are drawn, also where Q heads guide them."""

    ilql_beta: float = leaf(
        1.0, "weight of the advantage beside the log-probs in what an ILQL model draws by", at_least=0
    )


@dataclass
class GuidedSweepConfig(SweepConfig):
    """Values of one setting that every evaluation goes through; metrics are logged as name@setting=value."""

    beta: list[float] = leaf([], "values of rollout.ilql_beta that every evaluation goes through", at_least=0)


@dataclass
class GuidedEvalConfig(EvalConfig):
    """How evaluations generate; what is not said here is as in rollout."""

    sweep: GuidedSweepConfig = section(GuidedSweepConfig)


@dataclass
class ILQLSettings:
    """Implicit language Q-learning."""

    tau: float = leaf(0.7, "expectile that V follows: above 0.5 it leans towards the better actions", above=0, below=1)
    gamma: float = leaf(0.99, "discount of later rewards", at_least=0, at_most=1)
    cql_scale: float = leaf(0.1, "weight of the conservative term, which keeps Q near the data", at_least=0)
    awac_scale: float = leaf(1.0, "weight of the policy's own loss", at_least=0)
    awac_beta: float = leaf(0.0, "how much the policy's loss prefers actions of high advantage (0: not)", at_least=0)
    two_qs: bool = leaf(True, "two Q heads, of which the smaller counts, or one")
    target_alpha: float = leaf(0.001, "share of the way that the target heads go to the Q heads", above=0, at_most=1)
    target_every: int = leaf(5, "optimizer steps between moves of the target heads", at_least=1)
    pack: bool = leaf(True, "several short samples share a row of a pass (they never attend to each other)")

    @property
    def q_heads(self) -> int:
        """Number of Q heads."""
        return 2 if self.two_qs else 1
