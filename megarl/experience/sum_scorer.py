"""A scorer that is the weighted sum of several (`reward.terms`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.config.values import LARGEST
from megarl.data.prompts import Prompt
from megarl.errors import NumericsError
from megarl.experience.scorers import Scorer
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores, total, weighted_sum
from megarl.rollout.requests import Rollout

KEY = "reward.terms"


@dataclass(frozen=True)
class Weighted:
    """A scorer with its weight, and the name under which its scores are logged."""

    scorer: Scorer
    weight: float
    name: str


class SumScorer:
    """Scores rollouts with a weighted sum. A rollout that one of the scorers gives no score has none.

    The scorers work one after the other, each as it would alone.
    """

    name = "sum"

    def __init__(self, terms: Sequence[Weighted]) -> None:
        """`terms` are the scorers, in the order in which they are called."""
        self.terms = terms
        decides = repr([(term.weight, term.scorer.fingerprint) for term in terms])
        self.fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:16]

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the sums in the order of the rollouts. Every term's own scores, without its weight, are parts."""
        found = [term.scorer.score(prompts, rollouts, stream=stream, phase=phase) for term in self.terms]
        parts: dict[str, list[float | None]] = {}
        for term, scores in zip(self.terms, found, strict=True):
            parts[term.name] = [None if score is None else total(score) for score in scores.values]
            parts |= {f"{term.name}/{part}": column for part, column in scores.parts.items()}
        return Scores(
            values=[self._sum(row) for row in zip(*(scores.values for scores in found), strict=True)],
            parts=parts,
            failed_calls=sum(scores.failed_calls for scores in found),
            repeated_calls=sum(scores.repeated_calls for scores in found),
            reencoded=sum(scores.reencoded for scores in found),
        )

    def forget(self, before: int) -> None:
        """Discard the stored scores of phases before this one."""
        for term in self.terms:
            term.scorer.forget(before)

    def close(self) -> None:
        """Release processes and memory until the next call."""
        for term in self.terms:
            term.scorer.close()

    def _sum(self, scores: Sequence[Score | None]) -> Score | None:
        given = [score for score in scores if score is not None]
        if len(given) < len(scores):
            return None
        found = weighted_sum(given, [term.weight for term in self.terms])
        if not abs(total(found)) <= LARGEST:
            told = ", ".join(f"{term.weight:g} * {term.name}" for term in self.terms)
            raise NumericsError(
                f"{KEY}: the sum of {told} is {total(found):g}: use smaller weights, or look at the scores",
                key=KEY,
                value=total(found),
            )
        return found
