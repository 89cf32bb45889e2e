"""Importance weights between the policy that sampled and the one that training starts from.

Three policies take part in an update: the behaviour policy sampled the tokens (rollout_logprobs), the proximal policy
is the one before the update (old_logprobs), and the current one is being trained (logprobs). The ratio of the policy
loss compares current and proximal. Behaviour and proximal differ where tokens were sampled in another precision, by
another program, or by older weights; these weights correct for that.
"""

import torch
from torch import Tensor

from megarl.algorithms.aggregate import aggregate, mask_out
from megarl.algorithms.checks import check_choice, check_range
from megarl.algorithms.kl import MAX_LOG_RATIO

LEVELS = ("token", "sequence", "sequence_mean")
METHODS = ("truncate", "mask")


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    level: str = "token",
    method: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return proximal over behaviour probability [batch, time], limited; without a gradient and 0 where masked out.

    Args:
        old_logprobs: [batch, time], of the proximal policy.
        rollout_logprobs: [batch, time], of the behaviour policy.
        mask: [batch, time], 0/1.
        level: token: the ratio of each token; sequence: the product of a row's ratios, for all of its tokens;
            sequence_mean: their geometric mean.
        method: truncate: ratios outside [low, high] become the nearer bound; mask: they become 0.
        low, high: the bounds.

    Returns:
        The weights, and statistics of the ratios before they are limited: mean and max over tokens; ess (effective
        sample size as a share of the tokens, (sum w)^2 / (n sum w^2)); chi2 (mean of w^2, minus 1); kl (per token, the
        k3 estimate of KL(behaviour, proximal), whatever the level); limited (share of tokens whose ratio was outside
        the bounds).
    """
    check_choice("level", level, LEVELS)
    check_choice("method", method, METHODS)
    check_range("low", low, 0 <= low <= 1, "use a bound from 0 to 1")
    check_range("high", high, high >= 1, "use a bound of 1 or more")
    gap = mask_out(old_logprobs.detach() - rollout_logprobs.detach(), mask)
    followed = gap
    if level != "token":
        followed = gap.sum(dim=-1, keepdim=True).expand_as(gap)
        if level == "sequence_mean":
            followed = followed / mask.bool().sum(dim=-1, keepdim=True).clamp(min=1)
    ratios = followed.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside = (ratios < low) | (ratios > high)
    weights = ratios.clamp(low, high) if method == "truncate" else torch.where(outside, 0.0, ratios)

    def mean(values: Tensor) -> Tensor:
        return aggregate(values.to(gap.dtype), mask, "token_mean")

    square = mean(ratios.square())
    stats = {
        "mean": mean(ratios),
        "max": mask_out(ratios, mask).amax(),
        "ess": mean(ratios).square() / torch.where(square > 0, square, torch.ones_like(square)),
        "chi2": square - 1.0,
        "kl": mean(torch.expm1(gap.clamp(max=MAX_LOG_RATIO)) - gap),
        "limited": mean(outside),
    }
    return mask_out(weights, mask), stats
