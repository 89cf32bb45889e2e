"""Losses of reward models: ranked responses, scores, and scores of steps."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megarl.algorithms.aggregate import aggregate, mask_out


class Pairs(NamedTuple):
    """Pairs of rows of one unit of which one is better, [pairs] each.

    Attributes:
        better: index of the better row.
        worse: index of the other one.
        weight: 1 divided by the number of pairs of the unit.
    """

    better: Tensor
    worse: Tensor
    weight: Tensor


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """The reward model's loss: mean of -log sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: [batch], scores.
        margin: [batch], by how much the chosen one should lead; None for 0.
        mask: [batch], 0 for filler rows of a minibatch; None if there are none.
        denominator: global number of pairs; None for this batch's own.

    Returns:
        A scalar.
    """
    mask = torch.ones_like(chosen) if mask is None else mask
    losses = _losses(
        mask_out(chosen, mask), mask_out(rejected, mask), None if margin is None else mask_out(margin, mask)
    )
    return aggregate(losses, mask, "token_mean", denominator=denominator)


def ranked_pairs(unit: Tensor, level: Tensor, present: Tensor) -> Pairs:
    """Return all pairs of rows of one unit with different levels.

    Args:
        unit: [rows], equal for responses to the same prompt.
        level: [rows], higher is better.
        present: [rows], False for filler rows.
    """
    together = (unit[:, None] == unit[None, :]) & present[:, None] & present[None, :]
    is_better = together & (level[:, None] > level[None, :])
    better, worse = is_better.nonzero(as_tuple=True)
    of_unit = (together.to(torch.float32) @ is_better.to(torch.float32).sum(dim=1))[better]
    return Pairs(better, worse, 1 / of_unit.clamp(min=1))


def ranking_loss(
    scores: Tensor,
    pairs: Pairs,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Bradley-Terry loss over the pairs of each unit, in which every unit counts once.

    Args:
        scores: [rows].
        pairs: from `ranked_pairs`.
        margin: [rows], by how much a better row should lead; None for 0.
        center_coef: weight of the squared sum of the two scores of a pair, which keeps scores near 0.
        denominator: global number of units; None for 1.

    Returns:
        A scalar.
    """
    chosen, rejected = scores[pairs.better], scores[pairs.worse]
    losses = _losses(chosen, rejected, None if margin is None else margin[pairs.better])
    if center_coef:
        losses = losses + center_coef * (chosen + rejected).square()
    total = (pairs.weight * losses).sum()
    return total if denominator is None else total / denominator


def _losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) of each pair, [pairs]."""
    return -logsigmoid(chosen - rejected if margin is None else chosen - rejected - margin)
