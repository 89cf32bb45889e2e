"""Per-token credit assignment: rewards from scores and KL, advantages and returns, whitening.

All functions take the whole phase at once, so results do not depend on its later split into minibatches.
Masked-out positions may have any value, inside a response (tool output) as well as after it.
"""

import torch
from torch import Tensor

from megarl.algorithms.aggregate import mask_out

VARIANCE_EPS = 1e-8


def per_token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """Return the KL penalty of every token, plus the sequence's score on its last masked-in position.

    With k1, a row sums to the reward of Ziegler et al., 2019 (arXiv 1909.08593). The last position comes from the mask
    and never from comparing ids, so an EOS that the policy chose receives the score even if it equals the pad id. A row
    without masked-in positions gets no reward.

    Args:
        scores: [batch], one per sequence.
        kl: [batch, time], per-token estimates.
        mask: [batch, time], 0/1.
        kl_coef: strength of the penalty.

    Returns:
        [batch, time], 0 where masked out.
    """
    valid = mask.bool()
    positions = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(valid, positions, -1).amax(dim=-1, keepdim=True)
    score_at_last = torch.where(valid & (positions == last), scores.unsqueeze(-1), 0)
    return score_at_last - kl_coef * mask_out(kl, mask)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the masked-in positions (Schulman et al., 2016).

    delta_t = r_t + gamma*V' - V_t and A_t = delta_t + gamma*lam*A', where V' and A' are those of the next
    masked-in position, and 0 after the last one: masked-out positions inside a row are not time steps.

    Args:
        rewards: [batch, time].
        values: [batch, time], V(x_<t).
        mask: [batch, time], 0/1.
        gamma: discount.
        lam: weight between one-step errors (0) and Monte-Carlo returns (1).

    Returns:
        advantages and returns (advantages + values, unwhitened), both [batch, time] and 0 where masked out.
    """
    rewards, values, valid = mask_out(rewards, mask), mask_out(values, mask), mask.bool()
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0] + next_value)
    backwards = []
    for reward, value, here in zip(
        reversed(rewards.unbind(1)), reversed(values.unbind(1)), reversed(valid.unbind(1)), strict=True
    ):
        delta = reward + gamma * next_value - value
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
        backwards.append(next_advantage)
    advantages = mask_out(torch.stack(backwards[::-1], dim=1), mask)
    return advantages, advantages + values


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return the discounted sum of rewards from each position on; masked-out positions are not time steps.

    Args:
        rewards: [batch, time].
        mask: [batch, time], 0/1.
        gamma: discount.

    Returns:
        [batch, time], 0 where masked out.
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return returns


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the masked-in entries to unit (unbiased) variance, and centre them on 0 if `shift_mean`.

    Args:
        x: [batch, time] of the whole phase: the statistics are those of this tensor.
        mask: [batch, time], 0/1.
        shift_mean: False keeps the mean.

    Returns:
        [batch, time], 0 where masked out. A single masked-in entry equals its mean and becomes 0.
    """
    kept = mask_out(x, mask)
    count = mask.bool().sum()
    mean = kept.sum() / count.clamp(min=1)
    centred = mask_out(kept - mean, mask)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + VARIANCE_EPS)
    return whitened if shift_mean else mask_out(whitened + mean, mask)


def reinforce_pp_advantages(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """REINFORCE++ (Hu, 2025, arXiv 2501.03262): discounted reward-to-go, whitened over the batch.

    Args:
        rewards: [batch, time].
        mask: [batch, time], 0/1.
        gamma: discount.

    Returns:
        [batch, time], 0 where masked out.
    """
    return whiten(reward_to_go(rewards, mask, gamma), mask)


def remax_advantages(rewards: Tensor, baselines: Tensor, mask: Tensor) -> Tensor:
    """ReMax (Li et al., 2023, arXiv 2310.10505): undiscounted reward-to-go minus the score of the greedy response.

    Args:
        rewards: [batch, time].
        baselines: [batch], scores of the greedy responses.
        mask: [batch, time], 0/1.

    Returns:
        [batch, time], 0 where masked out.
    """
    return mask_out(reward_to_go(rewards, mask, gamma=1.0) - baselines.unsqueeze(-1), mask)
