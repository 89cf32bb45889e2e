"""Reduce per-token losses to a scalar that does not depend on how the batch was split.

A loss over microbatches and data-parallel ranks is a sum of `aggregate(..., denominator=global_count)`; the global
count is the sum of `aggregation_count` over them, computed beforehand.
"""

import torch
from torch import Tensor

from megarl.algorithms.checks import check_choice, check_range

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def mask_out(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` where `mask` is not 0, and 0 elsewhere, also in place of inf and nan.

    Multiplying by the mask would keep nan, and would let a nan through in the backward pass when a later
    function is not finite at the masked value. Select before anything non-linear.

    Args:
        x: [batch, time], or any shape that broadcasts with `mask`.
        mask: 0/1, of any dtype.
    """
    return torch.where(mask.bool(), x, 0)


def aggregation_count(mask: Tensor, how: str) -> Tensor:
    """Return the number that `aggregate` divides by: tokens for token_mean, non-empty rows for the seq_* kinds.

    Args:
        mask: [batch, time], 0/1.
        how: one of `AGGREGATIONS`.

    Returns:
        An integer scalar; sum it over microbatches and ranks to get the global `denominator`.
    """
    check_choice("aggregation", how, AGGREGATIONS)
    valid = mask.bool()
    return valid.sum() if how == "token_mean" else valid.any(dim=-1).sum()


def aggregate(
    loss: Tensor,
    mask: Tensor,
    how: str,
    norm: float | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Reduce a per-token loss to a scalar over the masked-in positions.

    token_mean weights all tokens equally. seq_mean_token_mean is the mean of the rows' token means.
    seq_mean_token_sum is the mean of the rows' token sums. seq_mean_token_sum_norm divides that by a constant.
    Fully masked rows are not counted; if every row is masked, the value and its gradients are 0.

    Args:
        loss: [batch, time]; masked-out positions may have any value.
        mask: [batch, time], 0/1.
        how: one of `AGGREGATIONS`.
        norm: the constant of seq_mean_token_sum_norm. None takes the padded width, which is the same for all
            microbatches only if they are padded alike.
        denominator: the global count, which replaces this batch's own `aggregation_count`.

    Returns:
        A scalar. With the global `denominator`, one summand of the loss of the whole batch.
    """
    count = aggregation_count(mask, how)
    kept = mask_out(loss, mask)
    if how == "token_mean":
        total = kept.sum()
    elif how == "seq_mean_token_mean":
        tokens = mask.bool().sum(dim=-1).clamp(min=1)
        total = (kept.sum(dim=-1) / tokens).sum()
    else:
        total = kept.sum(dim=-1).sum()
    if how == "seq_mean_token_sum_norm":
        width = kept.shape[-1] if norm is None else norm
        check_range("norm", width, width > 0, "it divides the loss; use the maximum response length")
        total = total / width
    return divide_or_zero(total, count if denominator is None else denominator)


def divide_or_zero(total: Tensor, count: Tensor | float) -> Tensor:
    """Return `total / count`, for a total that is 0 whenever the count is: an empty batch gives 0, not nan."""
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count, torch.ones_like(count))
    return total / (count if count > 0 else 1.0)
