"""A scorer that adds the scores of several others: functions, a reward model, reward servers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from megarl.data.prompts import Prompt
from megarl.experience.scorers import Scorer
from megarl.rewards.answers import NoScore, Score
from megarl.rewards.combine import number_of, weighted_sum
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout


class SumScorer:
    """The weighted sum of the scores of several scorers. A response without a score from any of them has none."""

    name = "sum"

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        """`weights` has the weight of each scorer by its name."""
        self.scorers, self.weights = dict(scorers), [float(weights[name]) for name in scorers]
        parts = [(name, scorer.fingerprint) for name, scorer in self.scorers.items()]
        self.fingerprint = hashlib.sha256(repr((parts, self.weights)).encode()).hexdigest()[:16]

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the sums, and as parts the scores of each scorer without its weight."""
        found = {
            name: scorer.score(prompts, rollouts, stream=stream, phase=phase) for name, scorer in self.scorers.items()
        }
        columns = zip(*(scores.values for scores in found.values()), strict=True)
        parts = {
            name: [None if one is None else number_of(one) for one in scores.values] for name, scores in found.items()
        }
        for scores in found.values():
            parts |= scores.parts
        return Scores(
            [self._sum(column) for column in columns],
            parts,
            failed_calls=sum(scores.failed_calls for scores in found.values()),
            repeated_calls=sum(scores.repeated_calls for scores in found.values()),
            reencoded=sum(scores.reencoded for scores in found.values()),
        )

    def forget(self, before: int) -> None:
        """Discard the stored scores of phases before this one."""
        for scorer in self.scorers.values():
            scorer.forget(before)

    def close(self) -> None:
        """Release what the scorers hold."""
        for scorer in self.scorers.values():
            scorer.close()

    def _sum(self, scores: Sequence[Score | None]) -> Score | None:
        present = [score for score in scores if score is not None]
        total = weighted_sum(present, self.weights) if len(present) == len(scores) else None
        return None if isinstance(total, NoScore) else total
