"""Differences of two runs over the same seeds, with an interval of their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much larger B's values are than A's.

    Attributes:
        a, b: means over the seeds.
        mean: mean of the differences b - a.
        low, high: interval of that mean; both are the difference itself with one seed.
        equal: whether all values are equal, bit for bit.
        values_a, values_b: the values by seed.
    """

    a: float
    b: float
    mean: float
    low: float
    high: float
    equal: bool
    values_a: tuple[float, ...] = ()
    values_b: tuple[float, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0. With one seed, whether the values differ at all."""
        return not self.equal and not self.low <= 0 <= self.high


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, interval: str = "t", confidence: float = 0.95
) -> Difference:
    """Return the difference of values [seeds] of two runs, paired by seed."""
    first, second = np.asarray(a, float), np.asarray(b, float)
    differences = second - first
    mean = float(differences.mean())
    if len(differences) == 1:
        low = high = mean
    elif interval == "bootstrap":
        draw = np.random.default_rng(0)
        picked = draw.integers(len(differences), size=(_RESAMPLES, len(differences)))
        outside = (1 - confidence) / 2
        low, high = np.quantile(differences[picked].mean(1), [outside, 1 - outside])
    else:
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        reach = t_quantile(confidence, len(differences) - 1) * error
        low, high = mean - reach, mean + reach
    equal = bool((first == second).all())
    means = float(first.mean()), float(second.mean())
    return Difference(*means, mean, float(low), float(high), equal, tuple(map(float, a)), tuple(map(float, b)))


def t_quantile(confidence: float, freedom: int) -> float:
    """Return t such that Student's distribution has this probability between -t and t.

    With t = sqrt(freedom) tan(angle), the density over angles is proportional to cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence * below[-1], below, angles)))
