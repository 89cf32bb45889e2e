"""Advantages of a phase, for each value of `ppo.advantages`. `config.advantages` states what each kind needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from megarl.errors import ConfigError, MegarlError
from megarl.functions.extensions import failed, load
from megarl.functions.named import resolve


@dataclass(frozen=True)
class PhaseResults:
    """The results of a phase, the same on every rank.

    Attributes:
        rewards: [rows, time] reward of each response token, with the KL penalty where it counts as a reward.
        mask: [rows, time], 1 at response tokens.
        groups: [rows] index of the prompt that each row responds to.
        values: [rows, time] predictions of the critic; None without a critic.
        greedy: [rows] score of the greedy response to each row's prompt; None where it is not needed.
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
        """[rows] sum of each row's rewards."""
        return mask_out(self.rewards, self.mask).sum(dim=1)

    def on_tokens(self, of_rows: Tensor) -> Tensor:
        """Return [rows, time]: the value of each row in `of_rows` [rows] at all of its response tokens."""
        return mask_out(of_rows[:, None].expand_as(self.mask), self.mask)


def _gae(results: PhaseResults) -> Tensor:
    assert results.values is not None
    return gae(results.rewards, results.values, results.mask, results.gamma, results.lam)[0]


def _grpo(results: PhaseResults) -> Tensor:
    return results.on_tokens(grpo_advantages(results.scores, results.groups))


def _without_deviation(results: PhaseResults) -> Tensor:
    return results.on_tokens(grpo_advantages(results.scores, results.groups, normalize=False))


def _rloo(results: PhaseResults) -> Tensor:
    return results.on_tokens(rloo_advantages(results.scores, results.groups))


def _opo(results: PhaseResults) -> Tensor:
    return results.on_tokens(opo_advantages(results.scores, results.groups, results.mask.sum(dim=1)))


def _reinforce_pp(results: PhaseResults) -> Tensor:
    return reward_to_go(results.rewards, results.mask, results.gamma)


def _remax(results: PhaseResults) -> Tensor:
    assert results.greedy is not None
    return remax_advantages(results.rewards, results.greedy, results.mask)


COMPUTE: dict[str, Callable[[PhaseResults], Tensor]] = {
    "gae": _gae,
    "grpo": _grpo,
    "dr_grpo": _without_deviation,
    "rloo": _rloo,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _without_deviation,
    "remax": _remax,
    "opo": _opo,
}
"""By the value of ppo.advantages, what computes a phase's advantages [rows, time] before whitening; 0 where masked out.

REINFORCE++ whitens its rewards to go. Its baseline variant whitens the advantages of Dr.GRPO.
"""


def compute(kind: str, results: PhaseResults) -> Tensor:
    """Return the advantages [rows, time] of a phase, by a kind or by a function of the user."""
    return COMPUTE[kind](results) if kind in COMPUTE else _of_function(kind, results)


def arguments_of(results: PhaseResults) -> dict[str, Any]:
    """Return what a function of the user may take. Each tensor is a copy, as other code reads the originals."""
    given = {name: getattr(results, name) for name in ("rewards", "scores", "mask", "groups", "values", "greedy")}
    copies = {name: value.clone() for name, value in given.items() if value is not None}
    return {**copies, "gamma": results.gamma, "lam": results.lam}


def _of_function(name: str, results: PhaseResults) -> Tensor:
    """Return the advantages that a function of the user computes: of shape [rows, time], or [rows] for one number of
    each response."""
    key = "ppo.advantages"
    function, given = load(key, name), arguments_of(results)
    takes = inspect.signature(function).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes):
        given = {one.name: given[one.name] for one in takes if one.name in given}
    try:
        found = torch.as_tensor(function(**given)).detach().to(results.rewards.dtype)
    except MegarlError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises anything
        raise failed(key, name, "failed", error, resolve(name, key).file) from error
    rows, time = results.rewards.shape
    if found.shape == (rows,):
        return results.on_tokens(found)
    if found.shape != (rows, time):
        raise ConfigError(
            f"{key}={name} returned advantages of shape {list(found.shape)}: return [{rows}, {time}], a number for "
            f"each token as in rewards, or [{rows}], one for each response",
            key=key,
            value=name,
        )
    return found


def group_counts(scores: Tensor, groups: Tensor) -> dict[str, float]:
    """Count the groups whose scores are all equal, which give no signal, and the groups of one response. Both arguments
    are [rows]."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    lowest = torch.full((len(sizes),), torch.inf, dtype=scores.dtype).scatter_reduce(0, index, scores, "amin")
    highest = torch.full((len(sizes),), -torch.inf, dtype=scores.dtype).scatter_reduce(0, index, scores, "amax")
    return {
        "rollout/zero_spread_groups": float(((lowest == highest) & (sizes > 1)).sum()),
        "rollout/groups_of_one": float((sizes == 1).sum()),
    }
