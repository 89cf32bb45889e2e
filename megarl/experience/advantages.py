"""Advantages of a phase, by the kinds of `ppo.advantages`; what each needs is in `config.advantages`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms import (
    gae,
    grpo_advantages,
    mask_out,
    opo_advantages,
    remax_advantages,
    reward_to_go,
    rloo_advantages,
)


@dataclass(frozen=True)
class Outcome:
    """What a phase came to, the same on every rank.

    Attributes:
        rewards: [rows, time], of each response token; the KL is in them where it counts as a reward.
        mask: [rows, time], 1 at response tokens.
        groups: [rows], which prompt each row answers.
        values: [rows, time], of the critic; None where there is none.
        greedy: [rows], the score of the likeliest response to each row's prompt; None where it was not asked for.
        gamma: discount of later rewards.
        lam: lambda of generalised advantage estimation.
    """

    rewards: Tensor
    mask: Tensor
    groups: Tensor
    values: Tensor | None = None
    greedy: Tensor | None = None
    gamma: float = 1.0
    lam: float = 1.0

    @property
    def scores(self) -> Tensor:
        """[rows] the sum of each row's rewards."""
        return mask_out(self.rewards, self.mask).sum(dim=1)

    def on_tokens(self, of_rows: Tensor) -> Tensor:
        """[rows, time] from [rows]: the same on every response token."""
        return mask_out(of_rows[:, None].expand_as(self.mask), self.mask)


def _gae(outcome: Outcome) -> Tensor:
    assert outcome.values is not None
    return gae(outcome.rewards, outcome.values, outcome.mask, outcome.gamma, outcome.lam)[0]


def _grpo(outcome: Outcome) -> Tensor:
    return outcome.on_tokens(grpo_advantages(outcome.scores, outcome.groups))


def _without_deviation(outcome: Outcome) -> Tensor:
    return outcome.on_tokens(grpo_advantages(outcome.scores, outcome.groups, normalize=False))


def _rloo(outcome: Outcome) -> Tensor:
    return outcome.on_tokens(rloo_advantages(outcome.scores, outcome.groups))


def _opo(outcome: Outcome) -> Tensor:
    return outcome.on_tokens(opo_advantages(outcome.scores, outcome.groups, outcome.mask.sum(dim=1)))


def _reinforce_pp(outcome: Outcome) -> Tensor:
    return reward_to_go(outcome.rewards, outcome.mask, outcome.gamma)


def _remax(outcome: Outcome) -> Tensor:
    assert outcome.greedy is not None
    return remax_advantages(outcome.rewards, outcome.greedy, outcome.mask)


COMPUTE: dict[str, Callable[[Outcome], Tensor]] = {
    "gae": _gae,
    "grpo": _grpo,
    "dr_grpo": _without_deviation,
    "rloo": _rloo,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _without_deviation,
    "remax": _remax,
    "opo": _opo,
}
"""[rows, time] advantages of a phase before they are whitened, 0 where masked out, by the value of `ppo.advantages`.

REINFORCE++ is its rewards to go whitened, and its baseline is Dr.GRPO whitened.
"""


def group_counts(scores: Tensor, groups: Tensor) -> dict[str, float]:
    """Count the groups whose members all score the same, which say nothing, and those of one member."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    lowest = torch.full((len(sizes),), torch.inf, dtype=scores.dtype).scatter_reduce(0, index, scores, "amin")
    highest = torch.full((len(sizes),), -torch.inf, dtype=scores.dtype).scatter_reduce(0, index, scores, "amax")
    return {
        "rollout/zero_spread_groups": float(((lowest == highest) & (sizes > 1)).sum()),
        "rollout/groups_of_one": float((sizes == 1).sum()),
    }
