"""The size of an algorithm's unit of work, from which a plan estimates memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.config.cluster import PlanConfig
from megarl.config.reward_terms import FN, URL
from megarl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The size of a unit of work: a phase for algorithms that generate, else an optimizer step. Lengths are in tokens.

    Attributes:
        length: length of a training sequence.
        loss_tokens: number of its tokens whose log-probs are computed.
        encoded: number of its first tokens that an encoder reads, in a model with one.
        steps: optimizer steps.
        per_unit: number of sequences in one of the units that the batch sizes count: 2 where they count pairs.
        entropy: whether the loss includes the policy's entropy.
        rollouts: number of responses that are trained on.
        per_prompt: number of responses to each prompt.
        evaluates: whether a run without rollouts generates in its evaluations.
        rescored: whether every model runs a forward pass over the responses before training.
        prompt: mean length of a prompt.
        response: mean length of a response.
        longest: maximum length of a response.
        slots: maximum number of responses that a replica generates at once.
        cache_bytes: maximum size of the KV cache; None for no limit.
        rollout_layout: parallel layout for generation; None for that of training.
        cuda_graphs: whether decoding steps are recorded as CUDA graphs.
        records_routes: whether the experts of each token are recorded.
        notes: one line of the plan for each participant that is not a model, by name.
    """

    length: int
    loss_tokens: int
    encoded: int = 0
    steps: int = 1
    per_unit: int = 1
    entropy: bool = False
    rollouts: int = 0
    per_prompt: int = 1
    evaluates: bool = False
    rescored: bool = False
    prompt: int = 0
    response: int = 0
    longest: int = 0
    slots: int = 0
    cache_bytes: int | None = None
    rollout_layout: str | None = None
    cuda_graphs: bool = False
    records_routes: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


def reward_note(config: Any) -> dict[str, str]:
    """Return the note of reward functions and servers; a reward model is a role."""
    told = {FN: "a function in its own process", URL: "servers that are not part of the run"}
    found = dict.fromkeys(told[term.kind] for term in config.reward.sources if term.kind in told)
    return {"reward": " and ".join(found)} if found else {}


def responses(config: Any, assumed: PlanConfig) -> dict[str, Any]:
    """Return the `Workload` fields of an algorithm that trains on its own responses."""
    generated = generation(config, assumed)
    length = generated["prompt"] + generated["longest"]
    sizes = {"length": length, "loss_tokens": generated["longest"], "encoded": generated["prompt"]}
    return {**sizes, "per_prompt": config.rollout.n, **generated}


def sequences(config: Any, assumed: PlanConfig) -> dict[str, Any]:
    """Return the `Workload` fields of an algorithm that trains on sequences of data.seq_length tokens, each of which
    may be a target. An encoder reads the prompts, of prompt_tokens or half a sequence."""
    length = config.data.seq_length
    if config.model.encoder is None:
        return {"length": length, "loss_tokens": length}
    encoded = length // 2 if assumed.prompt_tokens is None else assumed.prompt_tokens
    if encoded >= length:
        raise ConfigError(
            f"prompt_tokens={encoded} leaves no tokens for a response in data.seq_length={length}: use prompt_tokens="
            f"{max(1, length - 1)} or less",
            key="prompt_tokens",
            value=encoded,
            offers={"prompt_tokens": [max(1, length - 1)]},
        )
    return {"length": length, "loss_tokens": length - encoded, "encoded": encoded}


def generation(config: Any, assumed: PlanConfig) -> dict[str, Any]:
    """Return the `Workload` fields that describe generation."""
    prompt, response, longest = _lengths(config, assumed)
    engine = config.rollout.engine_settings
    return {
        "prompt": prompt,
        "response": response,
        "longest": longest,
        "slots": engine.slots,
        "cache_bytes": engine.cache_bytes,
        "rollout_layout": engine.layout,
        "cuda_graphs": engine.cuda_graphs,
        "records_routes": engine.router_replay,
    }


def _lengths(config: Any, assumed: PlanConfig) -> tuple[int, int, int]:
    """Return the number of tokens of a prompt, of a mean response and of the longest response."""
    longest, context = config.rollout.max_new_tokens, config.model.max_positions
    if longest >= context:
        raise ConfigError(
            f"rollout.max_new_tokens={longest} leaves no tokens for a prompt in model.max_positions={context}: "
            f"use rollout.max_new_tokens={max(1, context // 2)} or a longer context",
            key="rollout.max_new_tokens",
            value=longest,
            offers={"rollout.max_new_tokens": [max(1, context // 2)]},
        )
    prompt = min(longest, context - longest) if assumed.prompt_tokens is None else assumed.prompt_tokens
    if prompt + longest > context:
        raise ConfigError(
            f"prompt_tokens={prompt} and rollout.max_new_tokens={longest} exceed model.max_positions={context}: "
            f"use prompt_tokens={context - longest} or less",
            key="prompt_tokens",
            value=prompt,
            offers={"prompt_tokens": [context - longest]},
        )
    response = longest if assumed.response_tokens is None else assumed.response_tokens
    if response > longest:
        raise ConfigError(
            f"response_tokens={response} exceeds rollout.max_new_tokens={longest}: use {longest} or less",
            key="response_tokens",
            value=response,
            offers={"response_tokens": [longest]},
        )
    return prompt, response, longest
