"""Losses shared by several algorithms."""

from torch import Tensor

from megarl.algorithms import aggregate
from megarl.models.gpt import GPT
from megarl.parallel.engine import Stats
from megarl.parallel.rows import Microbatch


def cross_entropy(model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
    """Return the cross entropy, averaged over the target tokens of the global batch, and its statistics."""
    logprobs = model.logprobs(hidden, batch.targets, batch.target_mask).logprobs
    loss = aggregate(-logprobs, batch.target_mask, "token_mean", denominator=counts["tokens"])
    return loss, {"loss": loss}


def count_targets(batch: Microbatch) -> Stats:
    """Return the number of target tokens of a microbatch."""
    return {"tokens": batch.target_mask.sum()}
