"""The optional sections of `ppo`."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf


@dataclass
class AdaptiveKLConfig(Section):
    """How the weight of the KL to the reference is adapted."""

    target: float | None = leaf(
        None,
        "KL to the reference per response (the sum over its tokens) that ppo.kl_coef is adapted to reach, once per "
        "phase. Requires ppo.kl_coef above 0 (null: ppo.kl_coef stays constant).",
        above=0,
    )
    horizon: float = leaf(
        10_000.0,
        "Number of responses over which ppo.kl_coef changes by at most a fifth of itself, more than ppo.rollouts / 5.",
        above=0,
    )


@dataclass
class AdaptiveEntropyConfig(Section):
    """How the weight of the entropy bonus is adapted."""

    target: float | None = leaf(
        None,
        "Entropy per token that the policy should keep. After a phase below it, ppo.entropy_coef is raised by "
        "ppo.adaptive_entropy.step; after a phase above it, lowered. The bonus counts only in phases that start below "
        "the target (null: ppo.entropy_coef stays constant).",
        above=0,
    )
    step: float = leaf(0.0005, "Change of ppo.entropy_coef per phase.", above=0)
    maximum: float = leaf(0.1, "Largest value of ppo.entropy_coef.", above=0)


@dataclass
class OverlongConfig(Section):
    """What happens to long responses. A response is truncated if it reached rollout.max_new_tokens without EOS or a
    stop text."""

    mask: bool = leaf(
        False,
        "Exclude truncated responses from the loss. They are still scored and compared with the other responses to "
        "their prompt.",
    )
    missing_eos_penalty: float = leaf(
        0.0, "Subtracted, after clipping and scaling, from the score of a truncated response.", at_least=0
    )
    penalty: float = leaf(
        0.0,
        "Subtracted, after clipping and scaling, from the score of a response of rollout.max_new_tokens tokens. It "
        "falls in a line to 0 over ppo.overlong.buffer.",
        at_least=0,
    )
    buffer: float = leaf(
        0.2,
        "Share of rollout.max_new_tokens, at its end, over which ppo.overlong.penalty grows from 0.",
        above=0,
        at_most=1,
    )


@dataclass
class DynamicSamplingConfig(Section):
    """Replacement of prompts whose responses give no signal."""

    limit: float = leaf(
        4.0,
        "Maximum number of prompts that a phase may use, as a multiple of ppo.rollouts / rollout.n. Prompts whose "
        "responses all have the same score are replaced by the next prompts of the data until the phase is full or "
        "this limit is reached; the phase then trains on what it has.",
        at_least=1,
        at_most=1000,
    )

    def most_prompts(self, wanted: int) -> int:
        """Return the number of prompts that a phase of `wanted` prompts may use."""
        return int(round(wanted * self.limit, 6))  # 100 * 1.15 is just below 115


@dataclass
class CorrectionConfig(Section):
    """Importance weights for responses that another policy sampled than the one that training starts from."""

    level: str = leaf(
        "token",
        "Ratio of training to sampling probability. token: of each token; sequence: the product of a response's "
        "token ratios, for all of its tokens; sequence_mean: their geometric mean.",
        ("token", "sequence", "sequence_mean"),
    )
    method: str = leaf(
        "truncate",
        "What happens to ratios outside the bounds. truncate: they become the nearer bound; mask: they become 0. A "
        "token with weight 0 has no policy loss, but counts in means over tokens and in the entropy and KL losses.",
        ("truncate", "mask"),
    )
    low: float = leaf(0.0, "Lower bound of the ratios.", at_least=0, at_most=1)
    high: float = leaf(2.0, "Upper bound of the ratios.", at_least=1)


@dataclass
class ActionMaskConfig(Section):
    """The tokens that the policy may choose: the most likely ones of an earlier copy of itself."""

    top_p: float = leaf(
        0.9,
        "The policy chooses among the most likely tokens of its copy whose probabilities add up to this much. 1 "
        "allows every token.",
        above=0,
        at_most=1,
    )
    refresh_every: int = leaf(
        1,
        "Number of phases after which the copy takes the policy's weights. Training does not see tokens that the copy "
        "excludes, so they can return at a refresh with probabilities that nothing has corrected; the longer the copy "
        "stays, the more.",
        at_least=1,
    )
