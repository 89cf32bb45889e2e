"""From scores to what a policy trains on: rewards, advantages and returns of a whole phase, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import (
    AdaptiveKL,
    FixedKL,
    RunningMoments,
    kl_estimate,
    mask_out,
    per_token_rewards,
    whiten,
)
from megarl.algorithms.advantages import VARIANCE_EPS
from megarl.config.advantages import ADVANTAGES, whitens
from megarl.config.rl import PPOSettings
from megarl.experience.advantages import COMPUTE, PhaseResults, group_counts
from megarl.parallel.rows import Rows
from megarl.rewards.answers import Score
from megarl.rewards.scores import total

SMALLEST_STD = 1e-8  # scores that are all equal are divided by nothing


@dataclass(frozen=True)
class Greedy:
    """The likeliest responses that rows are compared with, one for each row: scores, and which ended at their maximum
    length."""

    scores: Sequence[Score]
    truncated: Sequence[bool]


class Shaping:
    """Holds what a run remembers of earlier phases: the KL coefficient and the moments of the scores."""

    def __init__(self, settings: PPOSettings) -> None:
        self.settings = settings
        self.kl_control: AdaptiveKL | FixedKL = (
            FixedKL(settings.kl_coef)
            if settings.kl_target is None
            else AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        )
        self.moments = RunningMoments()
        self.first_std: float | None = None  # of the first phase's scores

    def shape(self, rows: Rows, scores: Sequence[Score], greedy: Greedy | None = None) -> tuple[Rows, dict[str, float]]:
        """Return the rows with the columns advantages and, where there are values, returns, and what is logged of them.

        With `ppo.mask_overlong` no action of a truncated response is left in their action mask.

        Args:
            rows: with old_logprobs, group, truncated and, where there are a critic and a reference, values and
                ref_logprobs.
            scores: of each row, one number or one per response token.
            greedy: the likeliest response to each row's prompt.
        """
        settings, chosen, truncated = self.settings, rows.action_mask, rows["truncated"]
        given = torch.tensor([total(score) for score in scores], dtype=torch.float32)
        kl = torch.zeros_like(chosen)
        if "ref_logprobs" in rows:
            kl = kl_estimate(rows["old_logprobs"], rows["ref_logprobs"], settings.kl_kind) * chosen
        coef = self.kl_control.value if settings.kl_in == "reward" else 0.0
        factor = self._update_moments(given)
        rewards = self._rewards(scores, factor, chosen, kl, coef)
        rewards = self._penalise(rewards, chosen, truncated)
        if settings.whiten_rewards:
            rewards = whiten(rewards, chosen, shift_mean=False)
        mask = chosen * ~truncated[:, None] if settings.mask_overlong else chosen
        results = PhaseResults(
            rewards,
            chosen,
            rows["group"],
            values=rows.per_token.get("values"),
            greedy=None if greedy is None else self._greedy(greedy, factor),
            gamma=settings.gamma,
            lam=settings.lam,
        )
        advantages = mask_out(COMPUTE[settings.advantages](results), mask)
        white = whitens(settings)
        shaped = replace(rows, action_mask=mask).with_columns(
            advantages=whiten(advantages, mask) if white else advantages
        )
        stats = {
            "rollout/score": float(given.mean()),
            "rollout/score_std": float(given.std()) if len(given) > 1 else 0.0,
            **self._kl_stats(rows, kl),
            "rollout/cut": float(truncated.float().mean()),
        }
        if white:
            stats["rollout/whitening_factor"] = whitening_factor(advantages, mask)
        if ADVANTAGES[settings.advantages].groups:
            earned = self._penalise(self._rewards(scores, factor, chosen, kl, 0.0), chosen, truncated)
            stats |= group_counts(earned.sum(dim=1), rows["group"])
        if greedy is not None:
            stats["rollout/greedy_score"] = float(torch.tensor([total(score) for score in greedy.scores]).mean())
        if results.values is not None:
            returns = advantages + mask_out(results.values, mask)
            shaped = shaped.with_columns(returns=returns)
            stats["value/explained_variance"] = explained_variance(results.values, returns, mask)
        return shaped, stats

    def state_dict(self) -> dict[str, Any]:
        return {
            "kl_control": self.kl_control.state_dict(),
            "kl_steered": self._kl_steered,
            "moments": self.moments.state_dict(),
            "first_std": self.first_std,
        }

    def load_state_dict(self, state: dict[str, Any], *, other_scores: bool = False) -> None:
        """A coefficient that was steered goes on, unless this run steers it from or to another value; one that is fixed
        is this run's. Moments are left out where this run has `other_scores`."""
        if self.settings.kl_target is not None and state.get("kl_steered", self._kl_steered) == self._kl_steered:
            self.kl_control.load_state_dict(state["kl_control"])
        if not other_scores:
            self.moments.load_state_dict(state["moments"])
            self.first_std = state["first_std"]

    @property
    def _kl_steered(self) -> list[float | None]:
        """From which coefficient to which KL, where it is."""
        return [self.settings.kl_coef, self.settings.kl_target]

    def _rewards(self, scores: Sequence[Score], factor: float, mask: Tensor, kl: Tensor, coef: float) -> Tensor:
        """[rows, time]: a score lands on the last token of its response, per-token rewards on their own."""
        placed = torch.zeros_like(mask)
        single = torch.zeros(len(scores))
        for row, score in enumerate(scores):
            if isinstance(score, list):
                placed[row, mask[row] != 0] = torch.tensor(score)
            else:
                single[row] = score
        rewards = per_token_rewards(self._clipped(single) * factor, kl, mask, coef)
        return rewards + self._clipped(placed) * factor

    def _greedy(self, greedy: Greedy, factor: float) -> Tensor:
        """[rows] scores as the rewards have them: clipped, scaled, less the penalty for a missing end of sequence."""
        clipped = [self._clipped(torch.tensor(score, dtype=torch.float32)).sum() for score in greedy.scores]
        truncated = torch.tensor(greedy.truncated, dtype=torch.float32)
        return torch.stack(clipped) * factor - truncated * self.settings.missing_eos_penalty

    def _update_moments(self, given: Tensor) -> float:
        """What clipped scores are multiplied by; takes note of this phase's."""
        clipped = self._clipped(given).double()
        _, running = self.moments.update(clipped)
        if self.first_std is None:
            self.first_std = float(clipped.std()) if len(clipped) > 1 else 1.0
        std = {"ignored": 1.0, "running": float(running), "ref": self.first_std}[self.settings.scale_scores]
        return 1.0 / std if std > SMALLEST_STD else 1.0

    def _clipped(self, scores: Tensor) -> Tensor:
        bound = self.settings.clip_scores
        return scores if bound is None else scores.clamp(-bound, bound)

    def _kl_stats(self, rows: Rows, kl: Tensor) -> dict[str, float]:
        if "ref_logprobs" not in rows:
            return {}
        return {"rollout/kl": float(kl.sum() / len(kl)), "rollout/kl_coef": float(self.kl_control.value)}

    def _penalise(self, rewards: Tensor, mask: Tensor, truncated: Tensor) -> Tensor:
        """Take the penalty for a missing end of sequence from where the score landed."""
        if self.settings.missing_eos_penalty == 0:
            return rewards
        penalty = truncated.float() * self.settings.missing_eos_penalty
        return rewards + per_token_rewards(-penalty, torch.zeros_like(mask), mask, 0.0)


def whitening_factor(advantages: Tensor, mask: Tensor) -> float:
    """Return what whitening multiplies advantages by: much where they, and so errors of the critic, are small."""
    return float(torch.rsqrt(advantages[mask != 0].var(correction=1) + VARIANCE_EPS)) if mask.sum() > 1 else 0.0


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens: 1 for a perfect critic, 0 for a constant one."""
    chosen = mask != 0
    if chosen.sum() < 2:
        return 0.0
    spread = returns[chosen].double().var()
    if spread <= SMALLEST_STD:
        return 0.0
    return float(1 - (returns - values)[chosen].double().var() / spread)
