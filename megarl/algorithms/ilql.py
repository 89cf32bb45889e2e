"""Implicit language Q-learning (Snell et al., 2022, arXiv 2206.11871): the loss and the sampling scores.

The loss never needs the vocabulary dimension: values of the chosen tokens and cross entropies against them are inputs
that are already gathered, [batch, actions].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.algorithms.aggregate import aggregate, mask_out


def ilql_loss(
    q: Sequence[Tensor],
    target_q: Sequence[Tensor],
    v: Tensor,
    next_v: Tensor,
    q_nll: Sequence[Tensor],
    policy_nll: Tensor,
    rewards: Tensor,
    not_done: Tensor,
    mask: Tensor,
    *,
    tau: float,
    gamma: float,
    cql_scale: float,
    awac_scale: float,
    awac_beta: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TD error of Q, expectile regression of V, and two terms that keep both near the data.

    Q_hat is the minimum over the target heads. Gradients flow to q, v, q_nll and policy_nll, but not through the TD
    target, Q_hat and the AWAC weight.

    Args:
        q: one or two heads, each [batch, actions]: value of the token taken.
        target_q: the same of the target heads.
        v: [batch, actions], V of the state in which the action is taken.
        next_v: [batch, actions], V of the next state.
        q_nll: per head [batch, actions], cross entropy of the head's outputs against the token taken.
        policy_nll: [batch, actions], cross entropy of the policy's logits against the token taken.
        rewards: [batch, actions].
        not_done: [batch, actions], 1 where the next state is not terminal.
        mask: [batch, actions], 1 where there is an action.
        tau: expectile; above 0.5 V leans towards the better actions.
        gamma: discount.
        cql_scale: weight of the conservative term (q_nll).
        awac_scale: weight of the policy's own loss.
        awac_beta: how strongly the policy's loss weights actions of high advantage; 0 weights all equally.
        denominator: global number of actions; None for this batch's own.

    Returns:
        The loss, and its unscaled, detached terms loss_q, loss_v, loss_cql and loss_awac.
    """

    def action_mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, "token_mean", denominator=denominator)

    v = mask_out(v, mask)
    rewards = mask_out(rewards, mask)
    future = mask_out(mask_out(next_v.detach(), not_done), mask)
    td_target = rewards + gamma * future
    q_hat = mask_out(torch.stack([head.detach() for head in target_q]).amin(dim=0), mask)
    advantage = q_hat - v
    expectile = torch.where(advantage.detach() >= 0, torch.full_like(v, tau), 1.0 - tau)
    awac_weight = (awac_beta * advantage.detach()).exp()

    zero = torch.zeros_like(v).sum()
    loss_q = sum((action_mean((mask_out(head, mask) - td_target).square()) for head in q), start=zero)
    loss_v = action_mean(expectile * advantage.square())
    loss_cql = sum((action_mean(head) for head in q_nll), start=zero)
    loss_awac = action_mean(policy_nll * awac_weight)
    loss = loss_q + loss_v + cql_scale * loss_cql + awac_scale * loss_awac
    parts = {"loss_q": loss_q, "loss_v": loss_v, "loss_cql": loss_cql, "loss_awac": loss_awac}
    return loss, {name: part.detach() for name, part in parts.items()}


def next_state_values(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return V of the next state of each action: the state of the row's next action.

    The columns are token indices. Turns of others may lie between two actions. The last action has no next state.

    Args:
        values: [batch, time], V of the state in which the token is chosen.
        mask: [batch, time], 1 where the token is an action.

    Returns:
        next_v [batch, time], 0 without a next state; not_done [batch, time], 1 with one.
    """
    end = mask.shape[1]
    where = torch.arange(end, device=mask.device).expand_as(mask).masked_fill(mask == 0, end)
    first = where.flip(1).cummin(dim=1).values.flip(1)  # index of the first action at the token or after it
    later = torch.nn.functional.pad(first[:, 1:], (0, 1), value=end)
    not_done = (later < end) & (mask != 0)
    next_v = values.gather(1, later.clamp(max=end - 1))
    return mask_out(next_v, not_done), not_done.to(values.dtype)


def ilql_scores(logits: Tensor, q: Tensor | Sequence[Tensor], v: Tensor, beta: float) -> Tensor:
    """Return log_softmax(logits) + beta*(q - v): the policy shifted towards tokens of high advantage.

    Forbidden tokens have logits of -inf and keep them; apply top-k and other filters afterwards.

    Args:
        logits: [batch, vocabulary].
        q: [batch, vocabulary] of the target head, or of several: then their minimum is used.
        v: [batch] or [batch, 1].
        beta: weight of the advantage.

    Returns:
        [batch, vocabulary].
    """
    smallest = q if isinstance(q, Tensor) else torch.stack(tuple(q)).amin(dim=0)
    if v.dim() < logits.dim():
        v = v.unsqueeze(-1)
    return torch.log_softmax(logits, dim=-1) + beta * (smallest - v)
