"""How responses are generated."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import temperature
from megarl.config.leaf import Section, leaf
from megarl.config.sections.data import TOO_LONG


@dataclass
class RolloutConfig(Section):
    """How responses are generated."""

    max_new_tokens: int = leaf(128, "Maximum number of new tokens per response.", at_least=1, at_most=2**31 - 1)
    temperature: float = leaf(
        1.0,
        "Divides the logits before sampling; 0 takes the most likely token every time.",
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
        1.0, "Divides positive and multiplies negative logits of tokens that have occurred (1: no penalty).", above=0
    )
    n: int = leaf(1, "Number of responses per prompt.", at_least=1, at_most=2**20)
    stop: list[str] = leaf([], "Texts that end a response.")
    slots: int = leaf(128, "Number of responses that one replica generates at a time.", at_least=1, at_most=2**20)
    cache_bytes: int | None = leaf(
        None,
        "Maximum size in bytes of the key-value cache on one device (null: what rollout.slots need). A smaller cache "
        "generates fewer responses at a time.",
        at_least=1,
    )
    layout: str | None = leaf(
        None,
        "Layout that generates, as in tp4 or tp2xpp2; the weights are moved to it before each phase (null: the layout "
        "that trains).",
    )
    cuda_graphs: bool = leaf(
        False, "Generate in forward passes of fixed shapes, which a GPU replays as CUDA graphs. Requires parallel.pp=1."
    )
    too_long: str = leaf(
        "error",
        "What happens to prompts that leave no room for rollout.max_new_tokens in the model's context: their beginning "
        "is cut off, they are left out, or the run ends with an error before it starts.",
        TOO_LONG,
    )
    dump: str | None = leaf(None, "Folder to which the rollouts of every phase are written (null: they are not kept).")
    replay: str | None = leaf(
        None, "Folder of an earlier rollout.dump, whose rollouts are used instead of new ones (null: generate)."
    )


@dataclass
class GuidedRolloutConfig(RolloutConfig):
    """How responses are generated, also by a model whose Q heads guide the sampling."""

    ilql_beta: float = leaf(
        1.0,
        "Only for models trained with ILQL: weight of the advantages that are added to the log-probs before sampling.",
        at_least=0,
    )
