"""The scores of samples, with what is logged about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megarl.rewards.answers import Score


@dataclass
class Scores:
    """Scores of samples, in the order of the samples.

    Attributes:
        values: score of each sample, one number or one reward per response token; None without a score.
        parts: with several functions, the scores of each without its weight, by its name.
        failed_calls: number of calls that left at least one sample without a usable score.
        repeated_calls: number of calls that were repeated.
        reencoded: number of samples whose token ids differ between the policy and a reward model.
    """

    values: list[Score | None]
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    failed_calls: int = 0
    repeated_calls: int = 0
    reencoded: int = 0

    @property
    def dropped(self) -> int:
        """Number of samples without a score."""
        return sum(value is None for value in self.values)

    def part(self, rows: slice) -> Scores:
        """Return the scores of some samples. Each part has the counts of all calls."""
        parts = {name: column[rows] for name, column in self.parts.items()}
        return Scores(self.values[rows], parts, self.failed_calls, self.repeated_calls, self.reencoded)

    def of(self, rows: Sequence[int]) -> Scores:
        """Return the scores of the samples with these indices, and the counts of all calls."""
        parts = {name: [column[row] for row in rows] for name, column in self.parts.items()}
        return replace(self, values=[self.values[row] for row in rows], parts=parts)

    def totals(self) -> list[float]:
        """Return one number for each sample that has a score."""
        return [total(score) for score in self.values if score is not None]

    def means(self) -> dict[str, float]:
        """Return the mean of each component, over the samples that have it."""
        present = {part: [value for value in column if value is not None] for part, column in self.parts.items()}
        return {part: sum(values) / len(values) for part, values in present.items() if values}


def joined(all_scores: Sequence[Scores]) -> Scores:
    """Return the scores of several calls as one. A component that a call lacks is None for its samples."""
    names = dict.fromkeys(name for scores in all_scores for name in scores.parts)
    return Scores(
        values=[value for scores in all_scores for value in scores.values],
        parts={
            name: [value for scores in all_scores for value in scores.parts.get(name, [None] * len(scores.values))]
            for name in names
        },
        failed_calls=sum(scores.failed_calls for scores in all_scores),
        repeated_calls=sum(scores.repeated_calls for scores in all_scores),
        reencoded=sum(scores.reencoded for scores in all_scores),
    )


def total(score: Score) -> float:
    """Return a score as one number: per-token rewards count as their sum."""
    return sum(score) if isinstance(score, list) else score


def weighted_sum(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """Return the sum of a sample's weighted scores.

    Lists of per-token rewards, all of one length, add up token by token. A single number is added at the last token, as
    in training.
    """
    number, rewards = 0.0, None
    for score, weight in zip(scores, weights, strict=True):
        if not isinstance(score, list):
            number += weight * score
            continue
        weighted = [weight * reward for reward in score]
        rewards = weighted if rewards is None else [a + b for a, b in zip(rewards, weighted, strict=True)]
    return number if rewards is None else [*rewards[:-1], rewards[-1] + number]
