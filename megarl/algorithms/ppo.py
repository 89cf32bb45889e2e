"""The losses of on-policy algorithms: of the policy (PPO, GRPO, DAPO, GSPO, CISPO, A2C) and of the critic.

Statistics are detached scalars and token means. If the loss is divided by a global token count, so are they: like
the loss, they sum over microbatches and ranks to the mean of the whole batch. If the loss's `denominator` counts
rows, they use the token count of this batch: average them over microbatches.
"""

import torch
from torch import Tensor

from megarl.algorithms.aggregate import AGGREGATIONS, aggregate, mask_out
from megarl.algorithms.checks import check_choice, check_range
from megarl.algorithms.kl import MAX_LOG_RATIO

OBJECTIVES = ("clipped", "cispo", "plain")
RATIOS = ("token", "sequence")

Stats = dict[str, Tensor]


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token_mean",
    norm: float | None = None,
    denominator: Tensor | float | None = None,
    objective: str = "clipped",
    weights: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The loss of the policy, by default the clipped surrogate (Schulman et al., 2017, equation 7).

    With A the advantage and clip(x) = x limited to [1 - clip_low, 1 + clip_high], a token's loss is
        clipped: max(-A*ratio, -A*clip(ratio)),
        cispo: -A*clip(ratio)*logprob, without a gradient through the ratio (arXiv 2506.13585),
        plain: -A*logprob (A2C, REINFORCE).
    At ratio 1 all three have the same gradient.

    Args:
        logprobs: [batch, time], of the policy being trained.
        old_logprobs: [batch, time], of the policy before this phase's training; they get no gradient.
        advantages: [batch, time].
        mask: [batch, time], 0/1.
        clip_low, clip_high: how far the ratio may fall below or rise above 1.
        dual_clip: limits the loss to dual_clip*|A| where A is negative (Ye et al., 2020); above 1, or None. Only with
            objective "clipped".
        ratio: "token": exp(logprobs - old_logprobs); "sequence": exp of that difference's mean over the
            row (GSPO, arXiv 2507.18071).
        aggregation, norm, denominator: see `aggregate`.
        objective: one of `OBJECTIVES`.
        weights: [batch, time] factors of the tokens' losses, which get no gradient; None for 1.

    Returns:
        The loss, and: clip_fraction (share of tokens whose loss is the clipped one), approx_kl (mean of old - new),
        ratio (mean), ratio_max (largest; 0 in an empty batch; never additive), dual_clip_fraction (share of tokens
        bound by dual_clip).
    """
    check_choice("objective", objective, OBJECTIVES)
    check_choice("ratio", ratio, RATIOS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, dual_clip > 1, "use a bound above 1, or null for none")
    log_ratio = mask_out(logprobs - old_logprobs.detach(), mask)
    advantages = mask_out(advantages, mask)
    followed = log_ratio
    if ratio == "sequence":
        tokens = mask.bool().sum(dim=-1, keepdim=True).clamp(min=1)
        followed = (log_ratio.sum(dim=-1, keepdim=True) / tokens).expand_as(log_ratio)
    ratios = followed.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    limited = ratios.clamp(1.0 - clip_low, 1.0 + clip_high)

    bound = torch.zeros_like(mask, dtype=torch.bool)
    if objective == "clipped":
        plain, clipped = -advantages * ratios, -advantages * limited
        is_clipped, losses = clipped > plain, torch.maximum(plain, clipped)
        if dual_clip is not None:
            ceiling = -advantages * dual_clip
            bound = (advantages < 0) & (losses > ceiling)
            losses = torch.where(bound, ceiling, losses)
    elif objective == "cispo":
        is_clipped = limited != ratios
        losses = -advantages * limited.detach() * mask_out(logprobs, mask)
    else:
        is_clipped = bound
        losses = -advantages * mask_out(logprobs, mask)
    if weights is not None:
        losses = losses * mask_out(weights.detach(), mask)
    loss = aggregate(losses, mask, aggregation, norm=norm, denominator=denominator)

    token_count = denominator if aggregation == "token_mean" else None
    stats = {
        "clip_fraction": _token_mean(is_clipped, losses, mask, token_count),
        "approx_kl": _token_mean(-log_ratio, losses, mask, token_count),
        "ratio": _token_mean(ratios, losses, mask, token_count),
        "ratio_max": mask_out(ratios.detach(), mask).amax(),
        "dual_clip_fraction": _token_mean(bound, losses, mask, token_count),
    }
    return loss, stats


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """The clipped value loss: half the token mean of max((V - R)^2, (clip(V, V_old +- clip) - R)^2).

    Args:
        values: [batch, time], of the critic being trained.
        old_values: [batch, time], of the critic before this phase's training; they get no gradient.
        returns: [batch, time]; they get no gradient.
        mask: [batch, time], 0/1.
        clip: how far a value may move from its old one with a gradient; None for no bound.
        denominator: global token count; None for this batch's own.

    Returns:
        The loss, and: clip_fraction (share of tokens where the clipped error is the larger), value_error
        (mean squared error without clipping).
    """
    values = mask_out(values, mask)
    old_values = mask_out(old_values.detach(), mask)
    returns = mask_out(returns.detach(), mask)
    plain = (values - returns).square()
    losses, is_clipped = plain, torch.zeros_like(mask, dtype=torch.bool)
    if clip is not None:
        check_range("clip", clip, clip >= 0, "use a width of 0 or more, or null for none")
        moved = values.clamp(old_values - clip, old_values + clip)
        clipped = (moved - returns).square()
        losses, is_clipped = torch.maximum(plain, clipped), clipped > plain
    loss = 0.5 * aggregate(losses, mask, "token_mean", denominator=denominator)
    stats = {
        "clip_fraction": _token_mean(is_clipped, losses, mask, denominator),
        "value_error": _token_mean(plain, losses, mask, denominator),
    }
    return loss, stats


def _token_mean(x: Tensor, like: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Return the detached token mean of `x`, [batch, time] of any dtype, in the dtype of `like`."""
    return aggregate(x.detach().to(like.dtype), mask, "token_mean", denominator=denominator)
