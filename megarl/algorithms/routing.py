"""How the router of a mixture of experts chooses, and the losses that keep it balanced."""

import torch
from torch import Tensor


def choose(logits: Tensor, count: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return the experts of each token [tokens, count], best first, and their weights, from the router's scores.

    A weight is the expert's share of a softmax over all experts; with `normalise`, over the chosen ones alone.

    Args:
        logits: [tokens, experts] float32.
    """
    experts = logits.topk(count, dim=-1).indices
    return experts, weights_of(logits, experts, normalise=normalise)


def weights_of(logits: Tensor, experts: Tensor, *, normalise: bool) -> Tensor:
    """Return the weights [tokens, count] of given experts of each token; see `choose`."""
    scores = logits.gather(-1, experts)
    if normalise:
        return scores.softmax(dim=-1)
    return torch.exp(scores - logits.logsumexp(dim=-1, keepdim=True))


def balance_loss(logits: Tensor, counts: Tensor, rows: Tensor, lengths: Tensor, *, chosen: int, total: float) -> Tensor:
    """Return how unevenly the tokens of each row are spread over the experts, weighted by the rows' tokens: 1 if even.

    For each row it is experts * sum over experts of (share of the row's choices) * (mean probability in the row), the
    loss of Switch Transformers (arXiv:2101.03961). Per row, it does not depend on how a batch is cut. The choices have
    no gradient. Where several ranks have tokens of a row, the sum of their results is the loss.

    Args:
        logits: [tokens, experts] float32, those of this rank.
        counts: [rows, experts], how many tokens of a row chose an expert, on all ranks that have tokens of it.
        rows: [tokens] long, the row of each token.
        lengths: [rows], tokens of each row on all of these ranks, at least 1.
        chosen: number of experts per token.
        total: number of tokens of the whole batch.
    """
    shares = counts / (chosen * lengths[:, None])
    return (shares[rows] * logits.softmax(dim=-1)).sum() * logits.shape[-1] / total


def z_loss(logits: Tensor, *, total: float) -> Tensor:
    """Return the mean over tokens of the squared log-sum-exp of the scores (arXiv:2202.08906): near 0 they keep their
    precision in bfloat16."""
    return logits.logsumexp(dim=-1).square().sum() / total
