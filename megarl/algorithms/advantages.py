"""Per-token credit: rewards from scores and KL, advantages and returns, whitening.

Everything here sees the whole phase at once, so that nothing depends on how it is later cut in minibatches.
Masked-out positions may hold anything, inside a response (tool output) as well as after it.
"""

import torch
from torch import Tensor

from megarl.algorithms.aggregate import mask_out

VARIANCE_EPS = 1e-8


def per_token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """The KL penalty of every token, plus the sequence's score on its last masked-in position.

    The last position comes from the mask and never from comparing ids, so an EOS that the policy chose
    receives the score also where the pad id is the same. A row with nothing masked in gets nothing.

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
    """Generalised advantage estimation over the masked-in positions.

    delta_t = r_t + gamma*V' - V_t and A_t = delta_t + gamma*lam*A', where V' and A' are those of the next
    masked-in position, and 0 after the last one: a hole in the mask is not a step.

    Args:
        rewards: [batch, time].
        values: [batch, time], V(x_<t).
        mask: [batch, time], 0/1.
        gamma: discount.
        lam: between one-step errors (0) and Monte-Carlo returns (1).

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
    """Discounted sum of the rewards from each position on; holes in the mask neither count nor discount.

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
    """Scale the masked-in entries to unit (unbiased) variance, and centre them on 0 if asked.

    Args:
        x: [batch, time]; hand over the whole phase: statistics are taken over what is given here.
        mask: [batch, time], 0/1.
        shift_mean: False leaves the mean where it is.

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
    """REINFORCE++: discounted reward-to-go, whitened over the batch.

    Args:
        rewards: [batch, time].
        mask: [batch, time], 0/1.
        gamma: discount.

    Returns:
        [batch, time], 0 where masked out.
    """
    return whiten(reward_to_go(rewards, mask, gamma), mask)


def remax_advantages(rewards: Tensor, baselines: Tensor, mask: Tensor) -> Tensor:
    """ReMax: undiscounted reward-to-go minus the score of the prompt's greedy response.

    Args:
        rewards: [batch, time].
        baselines: [batch], scores of the greedy responses.
        mask: [batch, time], 0/1.

    Returns:
        [batch, time], 0 where masked out.
    """
    return mask_out(reward_to_go(rewards, mask, gamma=1.0) - baselines.unsqueeze(-1), mask)
