"""Token scores for an ILQL model: its log-probs plus beta times the advantage of each token."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.models.exchange.source import Source
from megarl.models.gpt import GPT
from megarl.models.heads import heads_in
from megarl.parallel.vocab import VocabShard
from megarl.rollout.static import TokenScorer


def policy_heads(source: Source | None) -> tuple[str, ...]:
    """Return the heads that a stored model generates with: those of ILQL if it has them, else the output layer."""
    heads = heads_in(source.heads) if source is not None else ("lm",)
    return heads if {"value", "q"} <= set(heads) else ("lm",)


def scorer_for(heads: Sequence[str], beta: float) -> TokenScorer:
    """Return the scores that a model with these heads samples tokens from."""
    return guided(beta) if "q" in heads else GPT.logits


@cache  # recorded CUDA graphs are valid for this same function object only
def guided(beta: float) -> TokenScorer:
    """Return a `TokenScorer` that computes log_softmax(logits) + beta * (min target Q - V), before the usual
    filters."""

    def scores(model: GPT, states: Tensor) -> Tensor:
        logprobs = _log_softmax(model.logits(states), model.shard)
        if beta == 0.0:
            return logprobs
        values = model.value_head(states)
        advantages: Tensor = model.target_q_heads.smallest(states, model.shard) - values[:, None]
        return logprobs + beta * advantages

    return scores


def _log_softmax(logits: Tensor, shard: VocabShard) -> Tensor:
    """Return the log-softmax [rows, valid] of a shard's logits, normalised over the whole vocabulary."""
    if shard.group is None:
        return torch.log_softmax(logits, dim=1)
    own = torch.logsumexp(logits, dim=1)  # -inf where a shard has no tokens
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, own, group=shard.group)
    return logits - torch.logsumexp(torch.stack(parts), dim=0)[:, None]
