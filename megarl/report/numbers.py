"""Small statistics of lists of numbers, without numpy, so that a finding costs no import."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarl.report.data import Point


def values(points: Sequence[Point]) -> list[float]:
    """Return the values of a series."""
    return [value for _, value in points]


def mean(numbers: Sequence[float]) -> float:
    """Return the mean; 0 without numbers."""
    return _size(numbers) * (math.fsum(_scaled(numbers)) / len(numbers)) if numbers else 0.0


def median(numbers: Sequence[float]) -> float:
    """Return the median; 0 without numbers."""
    if not numbers:
        return 0.0
    ordered, half = sorted(numbers), len(numbers) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def first_and_last_third(numbers: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the first and the last third of a series, rounded up."""
    third = -(-len(numbers) // 3)
    return list(numbers[:third]), list(numbers[len(numbers) - third :])


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Pearson's correlation of two lists of equal length; 0 where either has no spread."""
    if len(left) < 2:
        return 0.0
    xs, ys = _scaled(left), _scaled(right)
    a, b = mean(xs), mean(ys)
    both = math.fsum((x - a) * (y - b) for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt(math.fsum((x - a) ** 2 for x in xs) * math.fsum((y - b) ** 2 for y in ys))
    return both / spread if spread > 0 else 0.0


def _size(numbers: Sequence[float]) -> float:
    """Return a power of two near the largest number. Divided by it, numbers have sums and squares that are finite."""
    return 2.0 ** (math.frexp(max(map(abs, numbers), default=0.0))[1] - 1)


def _scaled(numbers: Sequence[float]) -> list[float]:
    size = _size(numbers)
    return [number / size for number in numbers]


def joined(left: Sequence[Point], right: Sequence[Point]) -> list[tuple[int, float, float]]:
    """Return the steps that two series share, with both values."""
    there = dict(right)
    return [(step, value, there[step]) for step, value in left if step in there]


def shown(number: float) -> str:
    """Return a number with three significant digits."""
    return f"{number:.3g}"


def percent(share: float) -> str:
    """Return a share as a percentage without decimals."""
    return f"{100 * share:.0f} %"
