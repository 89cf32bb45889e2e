"""Generation of responses."""

# ruff: noqa: RUF009 - `leaf` and `optional_section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import temperature
from megarl.config.leaf import Section, leaf, optional_section
from megarl.config.sections.data import TOO_LONG


@dataclass
class RolloutEngineConfig(Section):
    """How responses are computed."""

    slots: int = leaf(
        128, "Maximum number of responses that one replica generates at a time.", at_least=1, at_most=2**20
    )
    cache_bytes: int | None = leaf(
        None,
        "Maximum size in bytes of the key-value cache on one device (null: what rollout.engine.slots need). A smaller "
        "cache generates fewer responses at a time; it must hold one longest sequence per pipeline stage.",
        at_least=1,
    )
    layout: str | None = leaf(
        None,
        "Parallel layout for generation: tp4, pp2 or tp2xpp2. The weights are copied into it before each phase and "
        "evaluation, which takes memory for a second copy. Excludes parallel.vpp, and pipeline stages if "
        "model.tie_embeddings=true. Not available in megarl.generate (null: the training layout).",
    )
    cuda_graphs: bool = leaf(
        False,
        "Decode in forward passes of fixed shapes, which a GPU replays as CUDA graphs. The layout that generates must"
        " have no pipeline stages. The key-value cache then stays allocated during training.",
    )
    router_replay: bool = leaf(
        False,
        "For a mixture of experts: record which experts compute each token while responses are generated, and let the "
        "same ones compute it when they are evaluated and trained on (policy and reference). Requires model.experts.",
    )


@dataclass
class ResponsesConfig(Section):
    """How responses are sampled and computed."""

    max_new_tokens: int = leaf(128, "Maximum number of new tokens per response.", at_least=1, at_most=2**31 - 1)
    temperature: float = leaf(
        1.0,
        "Divides the logits before sampling. 0 takes the most likely token every time, which training refuses.",
        at_least=0,
        form=temperature,
    )
    top_k: int | None = leaf(
        None, "Sample among this many most likely tokens (null: all).", at_least=1, at_most=2**20 - 1
    )
    top_p: float | None = leaf(
        None,
        "Sample among the most likely tokens whose probabilities add up to this much (null: all).",
        above=0,
        at_most=1,
    )
    min_p: float | None = leaf(
        None,
        "Sample among the tokens whose probability is at least this share of the most likely one's (null: all).",
        at_least=0,
        below=1,
    )
    repetition_penalty: float = leaf(
        1.0,
        "Divides positive and multiplies negative logits of tokens that occur in the prompt or in the response so far"
        " (1: no penalty). Log-probs are those without penalty, top_k, top_p and min_p.",
        above=0,
    )
    stop: list[str] = leaf(
        [],
        "Texts at which a response ends, besides EOS. The text stays in the response.",
    )
    too_long: str = leaf(
        "error",
        "What happens to prompts longer than the model's context minus rollout.max_new_tokens. truncate: their "
        "beginning is cut off; drop: they are left out; error: the run is refused before the first phase.",
        TOO_LONG,
    )
    engine: RolloutEngineConfig | None = optional_section(
        RolloutEngineConfig,
        "How responses are computed: responses at a time, cache, layout, CUDA graphs; null means the defaults.",
        null_is_defaults=True,
    )

    @property
    def engine_settings(self) -> RolloutEngineConfig:
        """The settings of how responses are computed, at their defaults where they are null."""
        return self.engine or RolloutEngineConfig()


@dataclass
class RolloutConfig(ResponsesConfig):
    """Settings of generation."""

    n: int = leaf(
        1,
        "Number of responses per prompt in training; evaluations use eval.n. In PPO a divisor of ppo.rollouts, in RFT"
        " at least 2, in ILQL without effect.",
        at_least=1,
        at_most=2**20,
    )
    dump: str | None = leaf(
        None,
        "Folder to which the responses of every phase and evaluation, and their scores, are written (null: they are "
        "not kept).",
    )
    replay: str | None = leaf(
        None,
        "Folder of an earlier rollout.dump, whose responses are used instead of new ones (null: generate). It needs "
        "the same prompts, order and tokenizer, and a file for every phase and evaluation. Stored scores are used if "
        "the function and its options are the same.",
    )


@dataclass
class GuidedResponsesConfig(ResponsesConfig):
    """How responses are sampled and computed, also of models whose Q heads guide the sampling."""

    ilql_beta: float = leaf(
        1.0,
        "Only for models trained with ILQL: weight of Q minus V of each token, which is added to its log-prob before "
        "sampling.",
        at_least=0,
    )


@dataclass
class GuidedRolloutConfig(GuidedResponsesConfig, RolloutConfig):
    """Settings of generation, also for models whose Q heads guide the sampling."""
