"""The configuration of PPO and of the algorithms that are PPO with other advantages, such as GRPO."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.advantages import ADVANTAGES
from megarl.config.leaf import Section, leaf, optional_section, section
from megarl.config.offers import Refusal, Rule, divisors, multiples
from megarl.config.trees import PhaseTree


@dataclass
class SeparateCriticConfig(Section):
    """A critic with its own weights."""

    path: str | None = leaf(
        None, "Checkpoint whose transformer the critic starts from (null: the same weights as the policy)."
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

    rollouts: int = leaf(128, "Responses per phase, over all processes.", at_least=1, at_most=2**24)
    inner_epochs: int = leaf(4, "Number of times that the responses of a phase are trained on.", at_least=1)
    advantages: str = leaf(
        "gae",
        "How advantages are computed. gae: from the values of a critic; grpo, dr_grpo, rloo, opo, "
        "reinforce_pp_baseline: by comparing the scores of all responses to a prompt; reinforce_pp: from the later "
        "rewards alone; remax: from the score minus that of the most likely response.",
        tuple(ADVANTAGES),
    )
    gamma: float = leaf(1.0, "Discount of later rewards.", at_least=0, at_most=1)
    lam: float = leaf(0.95, "Lambda of generalised advantage estimation.", at_least=0, at_most=1)
    clip_low: float = leaf(
        0.2, "A token whose advantage is negative trains until its ratio is this far below 1.", at_least=0, below=1
    )
    clip_high: float = leaf(
        0.2, "A token whose advantage is positive trains until its ratio is this far above 1.", at_least=0
    )
    dual_clip: float | None = leaf(
        None,
        "Maximum loss of a token with a negative advantage, as a multiple of its size (null: no maximum).",
        above=1,
    )
    ratio: str = leaf(
        "token",
        "Ratio of new to old probability, of each token or of the whole response (GSPO).",
        ("token", "sequence"),
    )
    aggregation: str = leaf(
        "token_mean",
        "How the losses of tokens become one number: the mean over all tokens, the mean over responses of their mean "
        "or of their sum, or that of their sum divided by rollout.max_new_tokens.",
        ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"),
    )
    clip_value: float | None = leaf(
        0.2, "How far a value may move in a phase before it no longer trains (null: no limit).", at_least=0
    )
    vf_coef: float = leaf(1.0, "Weight of the value loss of a shared critic.", at_least=0)
    entropy_coef: float = leaf(0.0, "Weight of the entropy bonus in the loss.", at_least=0)
    kl_coef: float = leaf(
        0.05, "Initial weight of the KL to the reference model (0: there is no reference model).", at_least=0
    )
    kl_in: str = leaf(
        "reward", "Where the KL is added: to the reward of each token, or to the loss.", ("reward", "loss")
    )
    kl_kind: str = leaf("k1", "Estimator of the KL.", ("k1", "k2", "k3", "abs"))
    kl_target: float | None = leaf(
        None, "KL per response that ppo.kl_coef is adapted to reach (null: ppo.kl_coef stays constant).", above=0
    )
    kl_horizon: float = leaf(
        10_000.0, "Number of responses over which an adapted ppo.kl_coef can change by a fifth.", above=0
    )
    kl_limit: float | None = leaf(
        None, "KL per response at which the run stops; at half of it, a warning is logged (null: no limit).", above=0
    )
    stop_at_kl: float | None = leaf(
        0.2,
        "Maximum KL between the policy and itself at the start of the phase: the policy stops training for the phase "
        "at the first minibatch above it. It is the mean of old minus new log-probs over the minibatch's tokens, so it "
        "can be negative (null: no limit).",
        above=0,
    )
    clip_scores: float | None = leaf(
        None, "Scores are clipped to plus or minus this value (null: not clipped).", above=0
    )
    scale_scores: str = leaf(
        "ignored",
        "What scores are divided by: nothing, the standard deviation of all scores so far, or that of the first "
        "phase's scores.",
        ("ignored", "running", "ref"),
    )
    whiten_advantages: bool | None = leaf(
        None,
        "Give the advantages of a phase mean 0 and standard deviation 1 (null: only with gae, reinforce_pp and "
        "reinforce_pp_baseline).",
    )
    whiten_rewards: bool = leaf(
        False, "Give the token rewards of a phase standard deviation 1; their mean stays the same."
    )
    missing_eos_penalty: float = leaf(
        0.0, "Subtracted from the score of a response that reached rollout.max_new_tokens without EOS.", at_least=0
    )
    mask_overlong: bool = leaf(
        False, "Leave responses that reached rollout.max_new_tokens without EOS out of the loss."
    )
    pack: bool = leaf(
        True, "Put several short responses into one sequence of a forward pass, without attention between them."
    )
    invariants: str = leaf(
        "strict",
        "What a violated invariant does, such as two computations of the same log-prob that differ: end the run with "
        "an error, or log a warning.",
        ("strict", "warn"),
    )

    def check(self) -> None:
        """Refuse whitened rewards where responses are compared, and limits of a KL that is not computed."""
        needs = ADVANTAGES[self.advantages]
        if self.whiten_rewards and (needs.groups or needs.greedy):
            raise Refusal(
                f"ppo.advantages={self.advantages} compares scores of whole responses, which ppo.whiten_rewards=true "
                "would change by their lengths",
                {"ppo.whiten_rewards": [False]},
                key="ppo.whiten_rewards",
                value=True,
            )
        for key, value in (("ppo.kl_target", self.kl_target), ("ppo.kl_limit", self.kl_limit)):
            if self.kl_coef == 0 and value is not None:
                raise Refusal(
                    f"{key}={value:g} needs a reference model, and with ppo.kl_coef=0 there is none",
                    {key: [None]},
                    "a ppo.kl_coef above 0",
                    key=key,
                    value=value,
                )


def groups_are_whole(config: Any, world_size: int) -> None:
    """A phase holds all responses to each of its prompts, and several where they are compared."""
    rollouts, n, advantages = config.ppo.rollouts, config.rollout.n, config.ppo.advantages
    if rollouts % n:
        raise Refusal(
            f"ppo.rollouts={rollouts} is not a multiple of rollout.n={n}, the responses per prompt",
            {"ppo.rollouts": multiples(n, rollouts), "rollout.n": divisors(rollouts)},
            key="ppo.rollouts",
            value=rollouts,
        )
    if ADVANTAGES[advantages].groups and n < 2:
        raise Refusal(
            f"ppo.advantages={advantages} compares the responses to a prompt, and with rollout.n={n} there is one",
            {
                "rollout.n": [divisor for divisor in divisors(rollouts) if divisor > 1],
                "ppo.advantages": [name for name, needs in ADVANTAGES.items() if not needs.groups],
            },
            key="rollout.n",
            value=n,
        )


def policy_is_the_one_that_responds(config: Any, world_size: int) -> None:
    """Training evaluates the same policy that generated, so nothing is dropped out at random."""
    if config.model.dropout > 0:
        raise Refusal(
            f"model.dropout={config.model.dropout:g} would train another policy than the one that responded",
            {"model.dropout": [0.0]},
            key="model.dropout",
            value=config.model.dropout,
        )


def critic_is_needed(config: Any, world_size: int) -> None:
    """There is a critic if it is needed, and its keys belong together. Keys that nothing reads are warned of later."""
    critic, advantages = config.critic, config.ppo.advantages
    if not ADVANTAGES[advantages].values:
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
    """The keys of PPO and its kin."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *PhaseTree.rules,
        critic_is_needed,
        groups_are_whole,
        policy_is_the_one_that_responds,
    )

    critic: CriticConfig = section(CriticConfig)
    ppo: PPOSettings = section(PPOSettings)
