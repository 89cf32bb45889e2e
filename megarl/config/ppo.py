"""The configuration of PPO and of the algorithms that are PPO with other advantages, such as GRPO."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.advantages import ADVANTAGES, critic_kind, needs_of
from megarl.config.leaf import Section, leaf, optional_section, section
from megarl.config.offers import Refusal, Rule, divisors, multiples
from megarl.config.ppo_sections import (
    ActionMaskConfig,
    AdaptiveEntropyConfig,
    AdaptiveKLConfig,
    CorrectionConfig,
    DynamicSamplingConfig,
    OverlongConfig,
)
from megarl.config.sections.extensions import EXTENSIONS, PPOExtensionsConfig
from megarl.config.sections.health import HEALTH, PPOHealthConfig
from megarl.config.trees import PhaseTree
from megarl.logging import get_logger, warn_once


@dataclass
class SeparateCriticConfig(Section):
    """Settings of a separate critic."""

    path: str | None = leaf(
        None,
        "Model whose weights the critic starts from, in any form that model.path accepts; of a checkpoint, the "
        "policy's weights, with a value head if there is one. It needs the policy's tokenizer and context (null: the "
        "policy's initial weights).",
    )
    lr: float | None = leaf(None, "Peak learning rate of the critic (null: optim.lr).", at_least=0)
    warmup_phases: int = leaf(0, "Number of first phases in which only the critic trains.", at_least=0)


@dataclass
class CriticConfig(Section):
    """The model that predicts returns."""

    kind: str = leaf(
        "shared",
        "A value head on the policy, a separate model, or no critic. ppo.advantages=gae needs a critic; the others "
        "use none, whatever this key says.",
        ("shared", "separate", "none"),
    )
    separate: SeparateCriticConfig | None = optional_section(
        SeparateCriticConfig,
        "Settings of a critic with critic.kind=separate; null means their defaults.",
        null_is_defaults=True,
    )

    @property
    def settings(self) -> SeparateCriticConfig:
        """The settings of a separate critic, at their defaults where they are null."""
        return self.separate or SeparateCriticConfig()


@dataclass
class PPOSettings(Section):
    """Proximal policy optimisation."""

    rollouts: int = leaf(
        128, "Responses per phase, over all processes. A multiple of rollout.n.", at_least=1, at_most=2**24
    )
    inner_epochs: int = leaf(
        4, "Number of passes over the responses of a phase; ppo.stop_at_kl may end them early.", at_least=1
    )
    advantages: str = leaf(
        "gae",
        "How advantages are computed. gae: generalised advantage estimation with a critic; grpo, dr_grpo, rloo, opo, "
        "reinforce_pp_baseline: each response's score relative to the other responses to its prompt (rollout.n of 2 "
        "or more); reinforce_pp: the discounted sum of rewards from each token on; remax: the sum of rewards from "
        "each token on, minus the score of the greedy response. A function of yours, as package.module:function or "
        "path/to/file.py:function, computes them from the arguments that it names (docs/extending.md).",
        tuple(ADVANTAGES),
        or_named="package.module:function",
    )
    gamma: float = leaf(
        1.0,
        "Discount of later rewards, per token. Only with ppo.advantages=gae and reinforce_pp.",
        at_least=0,
        at_most=1,
    )
    lam: float = leaf(
        0.95, "Lambda of generalised advantage estimation. Only with ppo.advantages=gae.", at_least=0, at_most=1
    )
    objective: str = leaf(
        "clipped",
        "Policy loss of a token, with A its advantage and its ratio as in ppo.ratio. clipped: max(-A*ratio, "
        "-A*clip(ratio)), as in PPO; cispo: -A*clip(ratio)*log-prob, so that every token has a gradient; plain: "
        "-A*log-prob, without ratio (A2C, REINFORCE).",
        ("clipped", "cispo", "plain"),
    )
    clip_low: float = leaf(
        0.2,
        "Lower clip range: ratios are clipped at 1 - ppo.clip_low. With ppo.objective=clipped, a token with a negative "
        "advantage gets no gradient once its ratio is below. 1: no bound.",
        at_least=0,
        at_most=1,
    )
    clip_high: float = leaf(
        0.2,
        "Upper clip range: ratios are clipped at 1 + ppo.clip_high. With ppo.objective=clipped, a token with a "
        "positive advantage gets no gradient once its ratio is above.",
        at_least=0,
    )
    dual_clip: float | None = leaf(
        None,
        "Maximum policy loss of a token with a negative advantage, as a multiple of the advantage's absolute value. "
        "Only with ppo.objective=clipped (null: no maximum).",
        above=1,
    )
    ratio: str = leaf(
        "token",
        "Ratio of new to old probability. token: of each token; sequence: the geometric mean of a response's token "
        "ratios, for all of its tokens (GSPO).",
        ("token", "sequence"),
    )
    aggregation: str = leaf(
        "token_mean",
        "How policy, entropy and KL losses are reduced. token_mean: mean over all tokens; seq_mean_token_mean: mean "
        "over responses of their token means; seq_mean_token_sum: mean over responses of their token sums; "
        "seq_mean_token_sum_norm: the same divided by rollout.max_new_tokens. The value loss is always a token mean.",
        ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"),
    )
    clip_value: float | None = leaf(
        0.2,
        "Maximum distance that a value may move towards its return in a phase before its loss has no gradient (null: "
        "no limit).",
        at_least=0,
    )
    vf_coef: float = leaf(1.0, "Weight of the value loss of a shared critic.", at_least=0)
    entropy_coef: float = leaf(
        0.0, "Weight of the entropy bonus in the loss; the initial one with ppo.adaptive_entropy.", at_least=0
    )
    adaptive_entropy: AdaptiveEntropyConfig | None = optional_section(
        AdaptiveEntropyConfig, "Adapt ppo.entropy_coef towards a target (null: it stays constant).", needs="target"
    )
    kl_coef: float = leaf(
        0.05, "Initial weight of the KL to the reference model (0: there is no reference model).", at_least=0
    )
    kl_in: str = leaf(
        "reward",
        "Where the KL to the reference acts: subtracted from the reward of each token, or added to the loss.",
        ("reward", "loss"),
    )
    kl_kind: str = leaf(
        "k1",
        "Estimator of the KL per token, with d = log-prob of the policy minus that of the reference. k1: d; k2: "
        "d^2/2; k3: exp(-d) - 1 + d; abs: the absolute value of d. In the loss, k1 has a gradient of mean 0 and k3 "
        "that of another divergence: k1_unbiased and k3_unbiased weight them by the ratio of new to old probability "
        "and have the gradient of the KL.",
        ("k1", "k2", "k3", "abs", "k1_unbiased", "k3_unbiased"),
    )
    adaptive_kl: AdaptiveKLConfig | None = optional_section(
        AdaptiveKLConfig, "Adapt ppo.kl_coef towards a target (null: it stays constant).", needs="target"
    )
    kl_limit: float | None = leaf(
        None,
        "Maximum mean KL to the reference per response (the sum over its tokens). A phase above it ends the run with "
        "an error before it trains; a phase above half of it logs a warning once. Requires ppo.kl_coef above 0 (null:"
        " no limit).",
        above=0,
    )
    stop_at_kl: float | None = leaf(
        0.2,
        "Maximum KL per token between the policy at the start of the phase and now, as a minibatch's mean of old "
        "minus new log-probs (which can be negative). The first minibatch above it is not applied, and the policy is "
        "not trained further in this phase; a separate critic is (null: no limit).",
        above=0,
    )
    clip_scores: float | None = leaf(
        None, "Scores are clipped to plus or minus this value, before ppo.scale_scores (null: not clipped).", above=0
    )
    scale_scores: str = leaf(
        "ignored",
        "Scaling of the scores. ignored: none; running: divided by the standard deviation of all scores so far; ref: "
        "by that of the run's first phase. The mean is not subtracted.",
        ("ignored", "running", "ref"),
    )
    whiten_advantages: bool | None = leaf(
        None,
        "Give the advantages of a phase mean 0 and standard deviation 1 (null: only with gae, reinforce_pp and "
        "reinforce_pp_baseline).",
    )
    whiten_rewards: bool = leaf(
        False,
        "Scale the token rewards of a phase, KL included, to standard deviation 1; their mean stays the same. Only "
        "with ppo.advantages=gae and reinforce_pp.",
    )
    overlong: OverlongConfig | None = optional_section(
        OverlongConfig,
        "What happens to long responses (null: nothing).",
        null_is_defaults=True,
    )
    dynamic_sampling: DynamicSamplingConfig | None = optional_section(
        DynamicSamplingConfig,
        "Replace prompts whose responses all have the same score by other prompts. ppo.dynamic_sampling={} switches it "
        "on (null: off).",
    )
    correction: CorrectionConfig | None = optional_section(
        CorrectionConfig,
        "Weight the policy loss by how much more likely a token is under the weights that training starts from than "
        "under those that sampled it (null: weights of 1).",
    )
    action_mask: ActionMaskConfig | None = optional_section(
        ActionMaskConfig,
        "Let the policy choose only among likely tokens of an earlier copy of itself, as NLPO does (null: all tokens).",
    )
    pack: bool = leaf(
        True, "Put several short responses into one sequence of a forward pass, without attention between them."
    )

    @property
    def kl_target(self) -> float | None:
        """The KL per response that `kl_coef` is adapted to reach; None if it is constant."""
        return None if self.adaptive_kl is None else self.adaptive_kl.target

    @property
    def kl_horizon(self) -> float:
        """Number of responses over which an adapted `kl_coef` changes by at most a fifth of itself."""
        return (self.adaptive_kl or AdaptiveKLConfig()).horizon

    @property
    def long_responses(self) -> OverlongConfig:
        """The section `overlong`, at its defaults where it is null."""
        return self.overlong or OverlongConfig()

    def check(self) -> None:
        """Refuse whitened rewards where responses are compared, too short a horizon, limits of an absent KL, unbiased
        gradients and a dual clip where there are none, and an entropy coefficient above its maximum. Warn of several
        epochs without a ratio."""
        needs = needs_of(self.advantages)
        target, horizon = self.kl_target, self.kl_horizon
        if target is not None and horizon <= self.rollouts / 5:
            raise Refusal(
                f"ppo.adaptive_kl.horizon={horizon:g} lets ppo.kl_coef change by more than itself in a phase of "
                f"ppo.rollouts={self.rollouts}",
                {},
                f"more than {self.rollouts / 5:g}",
                key="ppo.adaptive_kl.horizon",
                value=horizon,
            )
        if self.whiten_rewards and (needs.groups or needs.greedy):
            raise Refusal(
                f"ppo.advantages={self.advantages} compares scores of whole responses, which ppo.whiten_rewards=true "
                "would change by their lengths",
                {"ppo.whiten_rewards": [False]},
                key="ppo.whiten_rewards",
                value=True,
            )
        if self.kl_in == "reward" and self.kl_kind.endswith("_unbiased"):
            plain = self.kl_kind.removesuffix("_unbiased")
            raise Refusal(
                f"ppo.kl_kind={self.kl_kind} differs from {plain} while the policy trains, and ppo.kl_in=reward acts "
                "before that",
                {"ppo.kl_kind": [plain], "ppo.kl_in": ["loss"]},
                key="ppo.kl_kind",
                value=self.kl_kind,
            )
        if self.dual_clip is not None and self.objective != "clipped":
            raise Refusal(
                f"ppo.dual_clip={self.dual_clip:g} limits the clipped loss, and ppo.objective={self.objective}",
                {"ppo.dual_clip": [None], "ppo.objective": ["clipped"]},
                key="ppo.dual_clip",
                value=self.dual_clip,
            )
        if self.objective == "plain" and self.inner_epochs > 1:
            warn_once(
                get_logger(__name__),
                f"ppo.inner_epochs={self.inner_epochs} uses each response several times, and ppo.objective=plain does "
                "not correct for the updates between: use 1",
            )
        adaptive = self.adaptive_entropy
        if adaptive is not None and self.entropy_coef > adaptive.maximum:
            raise Refusal(
                f"ppo.entropy_coef={self.entropy_coef:g} is above ppo.adaptive_entropy.maximum={adaptive.maximum:g}",
                {
                    "ppo.entropy_coef": [adaptive.maximum],
                    "ppo.adaptive_entropy.maximum": [self.entropy_coef],
                },
                key="ppo.entropy_coef",
                value=self.entropy_coef,
            )
        for key, value in (("ppo.adaptive_kl.target", target), ("ppo.kl_limit", self.kl_limit)):
            if self.kl_coef == 0 and value is not None:
                raise Refusal(
                    f"{key}={value:g} needs a reference model, and with ppo.kl_coef=0 there is none",
                    {key: [None]},
                    "a ppo.kl_coef above 0",
                    key=key,
                    value=value,
                )


def groups_are_whole(config: Any, world_size: int) -> None:
    """Require ppo.rollouts to be a multiple of rollout.n, rollout.n of 2 or more where responses are compared, and that
    they are where equal scores are replaced."""
    rollouts, n, advantages = config.ppo.rollouts, config.rollout.n, config.ppo.advantages
    if rollouts % n:
        raise Refusal(
            f"ppo.rollouts={rollouts} is not a multiple of rollout.n={n}, the responses per prompt",
            {"ppo.rollouts": multiples(n, rollouts), "rollout.n": divisors(rollouts)},
            key="ppo.rollouts",
            value=rollouts,
        )
    if needs_of(advantages).groups and n < 2:
        raise Refusal(
            f"ppo.advantages={advantages} compares the responses to a prompt, and with rollout.n={n} there is one",
            {
                "rollout.n": [divisor for divisor in divisors(rollouts) if divisor > 1],
                "ppo.advantages": _grouped(False),
            },
            key="rollout.n",
            value=n,
        )
    if config.ppo.dynamic_sampling is not None and not needs_of(advantages).groups:
        raise Refusal(
            f"ppo.dynamic_sampling replaces prompts whose responses have equal scores, and ppo.advantages={advantages} "
            "learns from these too",
            {"ppo.dynamic_sampling": [None], "ppo.advantages": _grouped(True)},
            key="ppo.advantages",
            value=advantages,
        )


def _grouped(compares: bool) -> list[str]:
    """Return the kinds of advantages that compare the responses to a prompt, or those that do not."""
    return [name for name, needs in ADVANTAGES.items() if needs.groups == compares]


def action_mask_fits(config: Any, world_size: int) -> None:
    """Refuse an action mask where the copy of the policy cannot generate beside it."""
    if config.ppo.action_mask is None:
        return
    for key, value, off in (
        ("rollout.engine.cuda_graphs", config.rollout.engine_settings.cuda_graphs, False),
        ("rollout.engine.layout", config.rollout.engine_settings.layout, None),
    ):
        if value:
            raise Refusal(
                f"{key}={value} is not available with ppo.action_mask, whose copy of the policy generates beside it",
                {key: [off], "ppo.action_mask": [None]},
                key=key,
                value=value,
            )


def dropout_is_zero(config: Any, world_size: int) -> None:
    """Refuse dropout: log-probs in training must be those of the policy that generated."""
    if config.model.dropout > 0:
        raise Refusal(
            f"model.dropout={config.model.dropout:g} would train another policy than the one that responded",
            {"model.dropout": [0.0]},
            key="model.dropout",
            value=config.model.dropout,
        )


def critic_exists_if_needed(config: Any, world_size: int) -> None:
    """Refuse critic.kind=none with advantages that need values, keys of a separate critic with a shared one, and a
    warm-up as long as the run."""
    critic, advantages = config.critic, config.ppo.advantages
    if not needs_of(advantages).values:
        return
    if critic.kind == "none":
        raise Refusal(
            f"ppo.advantages={advantages} needs the values of a critic, and critic.kind=none",
            {
                "critic.kind": ["shared", "separate"],
                "ppo.advantages": [name for name, needs in ADVANTAGES.items() if not needs.values],
            },
            key="critic.kind",
            value="none",
        )
    own = critic.settings
    for key in ("path", "lr", "warmup_phases"):
        if critic.kind == "shared" and getattr(own, key):
            raise Refusal(
                f"critic.separate.{key}={getattr(own, key)} applies only to critic.kind=separate, and it is shared",
                {"critic.kind": ["separate"]},
                key=f"critic.separate.{key}",
                value=getattr(own, key),
            )
    if own.warmup_phases >= config.trainer.max_phases:
        raise Refusal(
            f"critic.separate.warmup_phases={own.warmup_phases} leaves the policy none of trainer.max_phases="
            f"{config.trainer.max_phases}",
            {"critic.separate.warmup_phases": [config.trainer.max_phases - 1]},
            key="critic.separate.warmup_phases",
            value=own.warmup_phases,
        )


@dataclass
class PPOConfig(PhaseTree):
    """The keys of PPO and GRPO."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *PhaseTree.rules,
        critic_exists_if_needed,
        groups_are_whole,
        action_mask_fits,
        dropout_is_zero,
    )

    critic: CriticConfig = section(CriticConfig)
    ppo: PPOSettings = section(PPOSettings)
    health: PPOHealthConfig | None = optional_section(PPOHealthConfig, HEALTH, null_is_defaults=True)
    extensions: PPOExtensionsConfig | None = optional_section(PPOExtensionsConfig, EXTENSIONS, null_is_defaults=True)

    def more_models(self) -> dict[str, str]:
        """Return the paths of the reward model and of a separate critic."""
        path, found = self.critic.settings.path, super().more_models()
        if path is not None and critic_kind(self) == "separate":
            found["critic.separate.path"] = path
        return found
