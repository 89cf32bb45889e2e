"""Reward shaping: from scores to the rewards, advantages and returns of a whole phase, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import (
    AdaptiveEntropy,
    AdaptiveKL,
    FixedEntropy,
    FixedKL,
    RunningMoments,
    importance_weights,
    kl_estimate,
    mask_out,
    per_token_rewards,
    whiten,
)
from megarl.algorithms.advantages import VARIANCE_EPS
from megarl.algorithms.kl import UNBIASED
from megarl.config.advantages import needs_of, whitens
from megarl.config.ppo import PPOSettings
from megarl.experience.advantages import PhaseResults, compute, group_counts
from megarl.parallel.rows import Rows
from megarl.rewards.answers import Score
from megarl.rewards.scores import total

SMALLEST_STD = 1e-8  # below this standard deviation, scores are not rescaled


@dataclass(frozen=True)
class Greedy:
    """The greedy responses that rows are compared with, one per row: their scores, whether each was truncated, and
    their numbers of tokens."""

    scores: Sequence[Score]
    truncated: Sequence[bool]
    lengths: Sequence[int]


class Shaping:
    """Shapes the rewards of each phase. Its state over phases: the coefficients of KL and entropy, the moments of the
    scores."""

    def __init__(self, settings: PPOSettings, max_new_tokens: int) -> None:
        """`max_new_tokens` is the length at which responses are truncated."""
        self.settings, self.max_new_tokens = settings, max_new_tokens
        self.overlong = settings.long_responses
        self.kl_control: AdaptiveKL | FixedKL = (
            FixedKL(settings.kl_coef)
            if settings.kl_target is None
            else AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        )
        adaptive = settings.adaptive_entropy
        self.entropy_control: AdaptiveEntropy | FixedEntropy = (
            FixedEntropy(settings.entropy_coef)
            if adaptive is None or adaptive.target is None
            else AdaptiveEntropy(settings.entropy_coef, adaptive.target, adaptive.step, adaptive.maximum)
        )
        self.moments = RunningMoments()
        self.first_std: float | None = None  # standard deviation of the first phase's scores

    def shape(
        self,
        rows: Rows,
        scores: Sequence[Score],
        greedy: Greedy | None = None,
        all_totals: Sequence[float] | None = None,
    ) -> tuple[Rows, dict[str, float]]:
        """Return the rows with the column advantages and, with a critic, returns [rows, time]; and metrics to log.

        With ppo.overlong.mask the action mask of a truncated response becomes zero. With ppo.correction the rows also
        have the column weights.

        Args:
            rows: with the columns old_logprobs, group and truncated, and values and ref_logprobs where there are any.
            scores: score of each row, one number or one per response token.
            greedy: the greedy response to each row's prompt.
            all_totals: total scores of all responses of the phase, also of those that do not train, for the moments
                that scale scores; None: those of the rows.
        """
        settings, actions, truncated = self.settings, rows.action_mask, rows["truncated"]
        totals = torch.tensor([total(score) for score in scores], dtype=torch.float32)
        kl = torch.zeros_like(actions)
        if "ref_logprobs" in rows:
            kl = (
                kl_estimate(rows["old_logprobs"], rows["ref_logprobs"], settings.kl_kind.removesuffix(UNBIASED))
                * actions
            )
        coef = self.kl_control.value if settings.kl_in == "reward" else 0.0
        factor = self._update_moments(totals if all_totals is None else torch.tensor(all_totals, dtype=torch.float32))
        rewards = self._rewards(scores, factor, actions, kl, coef)
        rewards = self._penalise(rewards, actions, truncated)
        if settings.whiten_rewards:
            rewards = whiten(rewards, actions, shift_mean=False)
        mask = actions * ~truncated[:, None] if self.overlong.mask else actions
        results = PhaseResults(
            rewards,
            actions,
            rows["group"],
            values=rows.per_token.get("values"),
            greedy=None if greedy is None else self._greedy(greedy, factor),
            gamma=settings.gamma,
            lam=settings.lam,
        )
        advantages = mask_out(compute(settings.advantages, results), mask)
        white = whitens(settings)
        shaped = replace(rows, action_mask=mask).with_columns(
            advantages=whiten(advantages, mask) if white else advantages
        )
        shaped, corrected = self._correct(shaped)
        stats = {
            "rollout/score": float(totals.mean()),
            "rollout/score_std": float(totals.std()) if len(totals) > 1 else 0.0,
            **self._kl_stats(rows, kl),
            "rollout/cut": float(truncated.float().mean()),
            **corrected,
        }
        if white:
            stats["rollout/whitening_factor"] = whitening_factor(advantages, mask)
        if needs_of(settings.advantages).groups:
            earned = self._penalise(self._rewards(scores, factor, actions, kl, 0.0), actions, truncated)
            stats |= group_counts(earned.sum(dim=1), rows["group"])
        if greedy is not None:
            stats["rollout/greedy_score"] = float(torch.tensor([total(score) for score in greedy.scores]).mean())
        if results.values is not None:
            returns = advantages + mask_out(results.values, mask)
            shaped = shaped.with_columns(returns=returns)
            stats["value/explained_variance"] = explained_variance(results.values, returns, mask)
        return shaped, stats

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients of KL and entropy, and the moments of the scores."""
        return {
            "kl_control": self.kl_control.state_dict(),
            "kl_steered": self._kl_steered,
            "entropy_control": self.entropy_control.state_dict(),
            "entropy_steered": self._entropy_steered,
            "moments": self.moments.state_dict(),
            "first_std": self.first_std,
        }

    def load_state_dict(self, state: dict[str, Any], *, other_scores: bool = False) -> None:
        """Restore adapted coefficients whose settings are unchanged; a fixed one stays as configured. Restore the
        moments of the scores unless this run has `other_scores`."""
        if self.settings.kl_target is not None and state.get("kl_steered", self._kl_steered) == self._kl_steered:
            self.kl_control.load_state_dict(state["kl_control"])
        if state.get("entropy_steered") == self._entropy_steered:
            self.entropy_control.load_state_dict(state["entropy_control"])
        if not other_scores:
            self.moments.load_state_dict(state["moments"])
            self.first_std = state["first_std"]

    @property
    def _kl_steered(self) -> list[float | None]:
        """Initial coefficient and target of the KL; the target is None for a fixed coefficient."""
        return [self.settings.kl_coef, self.settings.kl_target]

    @property
    def _entropy_steered(self) -> list[float | None]:
        """Initial coefficient and target of the entropy; the target is None for a fixed coefficient."""
        adaptive = self.settings.adaptive_entropy
        return [self.settings.entropy_coef, None if adaptive is None else adaptive.target]

    def steer_entropy(self, entropy: float) -> dict[str, float]:
        """Adapt the entropy's coefficient to a phase that begins with this entropy per token; return what to log."""
        self.entropy_control.begin(entropy)
        adaptive = isinstance(self.entropy_control, AdaptiveEntropy)
        return {"rollout/entropy_coef": self.entropy_control.value} if adaptive else {}

    def _rewards(self, scores: Sequence[Score], factor: float, mask: Tensor, kl: Tensor, coef: float) -> Tensor:
        """Return rewards [rows, time]: a score is at the last token of its response, per-token rewards are at their
        tokens."""
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
        """Return the scores [rows] shaped like rewards: clipped, scaled, less the penalties for length."""
        clipped = [self._clipped(torch.tensor(score, dtype=torch.float32)).sum() for score in greedy.scores]
        penalty = self._penalty(torch.tensor(greedy.lengths), torch.tensor(greedy.truncated))
        return torch.stack(clipped) * factor - penalty

    def _update_moments(self, totals: Tensor) -> float:
        """Update the moments with a phase's scores [rows] and return the factor that scales clipped scores."""
        clipped = self._clipped(totals).double()
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
        """Subtract the penalties for a missing EOS and for length from the reward of each response's last token."""
        penalty = self._penalty(mask.sum(dim=1), truncated)
        if not bool(penalty.any()):
            return rewards
        return rewards + per_token_rewards(-penalty, torch.zeros_like(mask), mask, 0.0)

    def _penalty(self, lengths: Tensor, truncated: Tensor) -> Tensor:
        """Return the penalties [rows] for a missing EOS and for length, of responses with these lengths [rows]."""
        buffer = self.overlong.buffer * self.max_new_tokens
        over = (lengths - (self.max_new_tokens - buffer)) / buffer
        missing_eos: Tensor = truncated.float() * self.overlong.missing_eos_penalty
        return missing_eos + self.overlong.penalty * over.clamp(0, 1)

    def _correct(self, rows: Rows) -> tuple[Rows, dict[str, float]]:
        """Return the rows with the column weights, and what to log of it; unchanged without ppo.correction."""
        correction = self.settings.correction
        if correction is None:
            return rows, {}
        weights, stats = importance_weights(
            rows["old_logprobs"],
            rows["rollout_logprobs"],
            rows.action_mask,
            level=correction.level,
            method=correction.method,
            low=correction.low,
            high=correction.high,
        )
        return rows.with_columns(weights=weights), {f"correction/{name}": float(value) for name, value in stats.items()}


def whitening_factor(advantages: Tensor, mask: Tensor) -> float:
    """Return the factor by which whitening scales advantages. It is large where they are small, and scales the critic's
    errors too."""
    return float(torch.rsqrt(advantages[mask != 0].var(correction=1) + VARIANCE_EPS)) if mask.sum() > 1 else 0.0


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over response tokens: 1 for a perfect critic, 0 for a constant
    one."""
    actions = mask != 0
    if actions.sum() < 2:
        return 0.0
    spread = returns[actions].double().var()
    if spread <= SMALLEST_STD:
        return 0.0
    return float(1 - (returns - values)[actions].double().var() / spread)
