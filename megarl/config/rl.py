"""Sections of the entry points that generate: prompts, rollouts, rewards, metrics, evaluation and the algorithms."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.advantages import ADVANTAGES
from megarl.config.leaf import leaf, optional_section, section

TOO_LONG = ("truncate", "drop", "error")
ON_ERROR = ("error", "drop")
SOURCES = "files, folders, hub names or functions (package.module:function, file.py:function) of {}"
OPTIONS = "keyword arguments of the functions among the sources of data"
A_YEAR_S = 31_536_000
"""The longest that anything waits: timers of the operating system and of torch overflow some way above."""


@dataclass
class RolloutConfig:
    """How responses are drawn."""

    max_new_tokens: int = leaf(128, "maximum number of new tokens per response", at_least=1, at_most=2**31 - 1)
    temperature: float = leaf(1.0, "divides the logits; 0 takes the likeliest token", at_least=0)
    top_k: int | None = leaf(None, "draw among the k likeliest tokens (null: all)", at_least=1, at_most=2**20 - 1)
    top_p: float | None = leaf(
        None, "draw among the likeliest tokens that hold this mass (null: all)", above=0, at_most=1
    )
    min_p: float | None = leaf(
        None, "draw among tokens at least this share as likely as the likeliest (null: all)", at_least=0, below=1
    )
    repetition_penalty: float = leaf(1.0, "lowers the scores of tokens that have occurred (1: no)", above=0)
    n: int = leaf(1, "responses to each prompt", at_least=1, at_most=2**20)
    stop: list[str] = leaf([], "texts that end a response")
    slots: int = leaf(128, "responses in flight on one replica", at_least=1, at_most=2**20)
    cache_bytes: int | None = leaf(
        None, "most bytes of keys and values on a device (null: what slots need)", at_least=1
    )
    layout: str | None = leaf(
        None, "layout that responses are drawn in, as tp4 or tp2xpp2; weights are moved (null: the training one)"
    )
    cuda_graphs: bool = leaf(False, "decode in passes of fixed shapes, which a GPU replays as CUDA graphs (pp 1)")
    too_long: str = leaf(
        "error",
        "what happens, when prompts are read, to those that leave no room for max_new_tokens in the model's context: "
        "cut on the left, left out or an error",
        TOO_LONG,
    )
    dump: str | None = leaf(None, "folder in which every phase's rollouts are kept (null: none)")
    replay: str | None = leaf(None, "folder of a dump, whose rollouts are used instead of new ones (null: generate)")


@dataclass
class PromptDataConfig:
    """Which prompts are trained and evaluated on; a record's other fields go to the reward function."""

    train: list[str] = leaf([], SOURCES.format("prompts"))
    eval: list[str] = leaf([], "prompts of evaluations, likewise (empty: no evaluation)")
    prompt_key: str = leaf("prompt", "key of the prompt in a record")
    messages_key: str = leaf("messages", "key of the list of messages, in records that are conversations")
    chat_template: str | None = leaf(
        None, "Jinja template for chats (null: the tokenizer's own, else the built-in one)"
    )
    train_split: str = leaf("train", "split of a hub data set that is trained on")
    eval_split: str = leaf("validation", "split of a hub data set that is evaluated on")
    options: dict[str, Any] = leaf({}, OPTIONS)


SCORER_START_S = 120.0
"""Seconds the process that scores may take to start and to load its function."""


@dataclass
class RewardConfig:
    """What scores responses, in a process of its own."""

    fn: str | None = leaf(
        None, "package.module:function or file.py:function; several as a weighted sum, '0.7*a:f + 0.3*b:g'"
    )
    options: dict[str, Any] = leaf({}, "keyword arguments that the function is given besides")
    timeout: float = leaf(60.0, "seconds one call may take before it is killed", above=0, at_most=A_YEAR_S)
    retries: int = leaf(1, "how often a failed call is made again", at_least=0, at_most=1000)
    on_error: str = leaf("error", "samples that still have no score: an error, or dropped and counted", ON_ERROR)
    batch_size: int | None = leaf(None, "samples per call (null: all in one)", at_least=1, at_most=2**24)
    devices: str = leaf("", "CUDA_VISIBLE_DEVICES of the scoring process (empty: it runs on the CPU)")


@dataclass
class MetricConfig:
    """What is measured of responses in evaluations besides their score; it has the reward's time-out."""

    fn: str | None = leaf(None, "a function called as reward.fn is; its mean is logged under its name")


@dataclass
class SweepConfig:
    """Values of one setting that every evaluation goes through; metrics are logged as name@setting=value."""

    temperature: list[float] = leaf([], "values of rollout.temperature that every evaluation goes through", at_least=0)


@dataclass
class EvalConfig:
    """How evaluations generate; what is not said here is as in rollout."""

    n: int = leaf(1, "responses to each prompt", at_least=1, at_most=2**20)
    table: int = leaf(4, "responses shown of each evaluation", at_least=0, at_most=1000)
    sweep: SweepConfig = section(SweepConfig)


@dataclass
class SeparateCriticConfig:
    """A critic with its own weights."""

    path: str | None = leaf(None, "checkpoint whose trunk it starts from (null: the policy's start)")
    lr: float | None = leaf(None, "peak learning rate (null: optim.lr)", at_least=0)
    warmup_phases: int = leaf(0, "first phases in which only the critic trains", at_least=0)


@dataclass
class CriticConfig:
    """The model that expects returns."""

    kind: str = leaf(
        "shared",
        "a head on the policy's trunk, a model of its own shape and weights, or no critic at all, where ppo.advantages "
        "need no values",
        ("shared", "separate", "none"),
    )
    separate: SeparateCriticConfig | None = optional_section(
        SeparateCriticConfig,
        "settings of a critic of kind separate, whose defaults hold where it is null",
        null_is_defaults=True,
    )

    @property
    def settings(self) -> SeparateCriticConfig:
        """The settings of a separate critic, at their defaults where they are null."""
        return self.separate or SeparateCriticConfig()


CLONE = "supervised cloning of samples before the first phase; the reference is what comes out of it"


@dataclass
class CloneConfig:
    """Supervised cloning of samples before the first phase."""

    data: list[str] = leaf(
        [],
        "files, folders, hub names or functions (package.module:function) of samples (empty: none): conversations "
        'under data.messages_key, prompts under data.prompt_key with their "completion", or a "text"',
    )
    steps: int = leaf(400, "optimizer steps", at_least=1)
    lr: float = leaf(1e-3, "learning rate", at_least=0)


@dataclass
class RFTSettings:
    """Rejection-sampling fine-tuning."""

    prompts: int | None = leaf(None, "prompts per phase (null: all of them)", at_least=1, at_most=2**24)
    improve_steps: int = leaf(4, "times a phase's answers are trained on, fewer of them each time", at_least=1)
    start_percentile: float = leaf(
        0.7, "answers below this share of their prompt's are left out at first", at_least=0, at_most=1
    )
    end_percentile: float = leaf(0.95, "and below this one in the last improvement step", at_least=0, at_most=1)


@dataclass
class PPOSettings:
    """Proximal policy optimisation."""

    rollouts: int = leaf(128, "responses per phase, over all processes", at_least=1, at_most=2**24)
    inner_epochs: int = leaf(4, "times a phase's responses are trained on", at_least=1)
    advantages: str = leaf(
        "gae",
        "how advantages are computed: from the values of a critic (gae); from the scores of all responses to a prompt "
        "(grpo, dr_grpo, rloo, opo, reinforce_pp_baseline); from the later rewards alone (reinforce_pp), or less the "
        "score of the prompt's likeliest response (remax)",
        tuple(ADVANTAGES),
    )
    gamma: float = leaf(1.0, "discount of later rewards", at_least=0, at_most=1)
    lam: float = leaf(0.95, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    clip_low: float = leaf(0.2, "how far the ratio may fall below 1 and still be followed", at_least=0, below=1)
    clip_high: float = leaf(0.2, "how far the ratio may rise above 1 and still be followed", at_least=0)
    dual_clip: float | None = leaf(
        None, "bounds the loss of bad tokens to this many times their advantage (null: not)", above=1
    )
    ratio: str = leaf("token", "ratio of each token, or of the whole response (GSPO)", ("token", "sequence"))
    aggregation: str = leaf(
        "token_mean",
        "how token losses become one number",
        ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"),
    )
    clip_value: float | None = leaf(0.2, "how far a value may move in a phase and still be followed", at_least=0)
    vf_coef: float = leaf(1.0, "weight of a shared critic's loss", at_least=0)
    entropy_coef: float = leaf(0.0, "weight of the entropy bonus", at_least=0)
    kl_coef: float = leaf(0.05, "weight of the KL to the reference, at first (0: no reference is kept)", at_least=0)
    kl_in: str = leaf("reward", "where the KL counts: in each token's reward or in the loss", ("reward", "loss"))
    kl_kind: str = leaf("k1", "estimator of the KL", ("k1", "k2", "k3", "abs"))
    kl_target: float | None = leaf(None, "KL per response that kl_coef is steered to (null: kl_coef is fixed)", above=0)
    kl_horizon: float = leaf(10_000.0, "responses it takes to change a steered kl_coef by a fifth", above=0)
    kl_limit: float | None = leaf(
        None, "KL per response at which the run stops; half of it is warned of (null: none)", above=0
    )
    stop_at_kl: float | None = leaf(
        0.2,
        "maximum KL of the policy from the policy at the start of the phase, measured as the mean of old minus new "
        "log-probs of a minibatch's tokens (so it can be below 0): policy training ends for the phase at the first "
        "minibatch above it (null: no limit)",
        above=0,
    )
    clip_scores: float | None = leaf(None, "scores are cut to plus or minus this (null: not)", above=0)
    scale_scores: str = leaf(
        "ignored",
        "scores are divided by nothing, their deviation so far, or the first phase's",
        ("ignored", "running", "ref"),
    )
    whiten_advantages: bool | None = leaf(
        None,
        "give a phase's advantages mean 0 and deviation 1 (null: with gae, reinforce_pp and reinforce_pp_baseline)",
    )
    whiten_rewards: bool = leaf(False, "give a phase's rewards deviation 1, their mean kept")
    missing_eos_penalty: float = leaf(0.0, "taken from the score of a response that was cut at its length", at_least=0)
    mask_overlong: bool = leaf(False, "responses cut at their length do not train")
    pack: bool = leaf(True, "several short responses share a row of a pass (they never attend to each other)")
    invariants: str = leaf("strict", "what a broken invariant does: stop the run, or warn", ("strict", "warn"))
