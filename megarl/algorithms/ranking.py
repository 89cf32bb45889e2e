"""Losses of reward models: ranked responses, scores, and scores of steps."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megarl.algorithms.aggregate import aggregate, mask_out


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


def ranked_pairs(unit: Tensor, level: Tensor, present: Tensor) -> Tensor:
    """Return the weight of each pair of rows, [rows, rows]: 1 divided by the number of pairs of the unit where the
    first row is better than the second, 0 elsewhere.

    A pair is two rows of one unit with different levels. All shapes follow from the number of rows alone, so that a GPU
    need not be waited for.

    Args:
        unit: [rows], equal for responses to the same prompt.
        level: [rows], higher is better.
        present: [rows], False for filler rows.
    """
    together = _same_unit(unit, present)
    is_better = together & (level[:, None] > level[None, :])
    of_unit = together.to(torch.float32) @ is_better.to(torch.float32).sum(dim=1)
    return is_better / of_unit.clamp(min=1)[:, None]


def count_units(unit: Tensor, present: Tensor) -> Tensor:
    """Return the number of different units, a scalar. The arguments are those of `ranked_pairs`."""
    is_repeated = _same_unit(unit, present).tril(diagonal=-1).any(dim=1)
    return (present & ~is_repeated).sum()


def leads(scores: Tensor) -> Tensor:
    """Return by how much the score of the first row of each pair exceeds that of the second, [rows, rows]."""
    return scores[:, None] - scores[None, :]


def ranking_loss(
    scores: Tensor,
    weights: Tensor,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Bradley-Terry loss over the pairs of each unit, in which every unit counts once.

    Args:
        scores: [rows].
        weights: [rows, rows], from `ranked_pairs`.
        margin: [rows], by how much a better row should lead; None for 0.
        center_coef: weight of the squared sum of the two scores of a pair, which keeps scores near 0.
        denominator: global number of units; None for 1.

    Returns:
        A scalar.
    """
    lead = leads(scores) if margin is None else leads(scores) - margin[:, None]
    losses = -logsigmoid(mask_out(lead, weights))
    if center_coef:
        losses = losses + center_coef * mask_out(scores[:, None] + scores[None, :], weights).square()
    total = (weights * losses).sum()
    return total if denominator is None else total / denominator


def _same_unit(unit: Tensor, present: Tensor) -> Tensor:
    """Return which two rows belong to one unit, [rows, rows]; filler rows belong to none."""
    return (unit[:, None] == unit[None, :]) & present[:, None] & present[None, :]


def _losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) of each pair, [pairs]."""
    return -logsigmoid(chosen - rejected if margin is None else chosen - rejected - margin)
