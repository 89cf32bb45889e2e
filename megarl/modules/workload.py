"""The size of an algorithm's unit of work, in numbers that a plan computes memory and time from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.config.cluster import PlanConfig
from megarl.errors import ConfigError

REWARD_NOTE = "a function in its own process"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A unit of work: a phase of an algorithm that generates, else an optimizer step. Lengths are in tokens.

    Attributes:
        length: of a sequence in training.
        loss_tokens: of these, those that log-probs are computed of.
        steps: optimizer steps.
        entropy: whether the loss has the policy's entropy.
        rollouts: responses that are trained on.
        evaluates: whether a run without rollouts generates in its evaluations.
        rescored: whether every model reads the responses before training.
        prompt: mean length of a prompt.
        response: mean length of a response.
        longest: length of the longest response.
        slots: responses that a replica generates at once, at most.
        cache_bytes: limit of the cache of keys and values; None for none.
        rollout_layout: the layout that is generated in; None for the training one.
        cuda_graphs: whether decode passes are recorded.
        notes: what takes part and is not a model, by name: a line of the plan each.
    """

    length: int
    loss_tokens: int
    steps: int = 1
    entropy: bool = False
    rollouts: int = 0
    evaluates: bool = False
    rescored: bool = False
    prompt: int = 0
    response: int = 0
    longest: int = 0
    slots: int = 0
    cache_bytes: int | None = None
    rollout_layout: str | None = None
    cuda_graphs: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


def responses(config: Any, assumed: PlanConfig) -> dict[str, Any]:
    """Return the fields of `Workload` of an algorithm that trains on its own responses."""
    found = generation(config, assumed)
    return {"length": found["prompt"] + found["longest"], "loss_tokens": found["longest"], **found}


def generation(config: Any, assumed: PlanConfig) -> dict[str, Any]:
    """Return the fields of `Workload` that say what is generated, and how."""
    prompt, response, longest = _lengths(config, assumed)
    return {
        "prompt": prompt,
        "response": response,
        "longest": longest,
        "slots": config.rollout.slots,
        "cache_bytes": config.rollout.cache_bytes,
        "rollout_layout": config.rollout.layout,
        "cuda_graphs": config.rollout.cuda_graphs,
    }


def _lengths(config: Any, assumed: PlanConfig) -> tuple[int, int, int]:
    """Return the tokens of a prompt, of a mean response and of the longest response."""
    longest, most = config.rollout.max_new_tokens, config.model.max_positions
    if longest >= most:
        raise ConfigError(
            f"rollout.max_new_tokens={longest} leaves no room for a prompt in model.max_positions={most}: "
            f"use rollout.max_new_tokens={max(1, most // 2)} or a longer context",
            key="rollout.max_new_tokens",
            value=longest,
            offers={"rollout.max_new_tokens": [max(1, most // 2)]},
        )
    prompt = min(longest, most - longest) if assumed.prompt_tokens is None else assumed.prompt_tokens
    if prompt + longest > most:
        raise ConfigError(
            f"prompt_tokens={prompt} and rollout.max_new_tokens={longest} are more than model.max_positions={most}: "
            f"use prompt_tokens={most - longest} or less",
            key="prompt_tokens",
            value=prompt,
            offers={"prompt_tokens": [most - longest]},
        )
    response = longest if assumed.response_tokens is None else assumed.response_tokens
    if response > longest:
        raise ConfigError(
            f"response_tokens={response} is more than rollout.max_new_tokens={longest}: use {longest} or less",
            key="response_tokens",
            value=response,
            offers={"response_tokens": [longest]},
        )
    return prompt, response, longest
