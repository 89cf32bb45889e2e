"""Reads what a reward function returned as scores: one finite number, or one per token, for every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Score = float | list[float]
LARGEST = 1e30
"""Largest absolute score: sums and squares of such scores are finite in float64, and sums in float32."""
_SHOWN = 60


@dataclass(frozen=True)
class NoScore:
    """A sample without a usable score. `why` completes "sample 3 ..."."""

    why: str


class AnswerError(Exception):
    """The returned value as a whole cannot be matched to the samples."""


def read_scores(answer: object, count: int, lengths: Sequence[int | None] | None = None) -> list[Score | NoScore]:
    """Return a score, or the reason why there is none, for each of `count` samples.

    Args:
        answer: what the function returned: a list, tuple, array or tensor.
        count: number of samples that the function scored.
        lengths: tokens of each response, which a list of per-token rewards must match; None is not checked.

    Raises:
        AnswerError: it is not a list, or its length is not `count`.
    """
    answer = _plain(answer)
    if not isinstance(answer, list | tuple):
        raise AnswerError(f"returned {_shown(answer)} instead of a list of {count} scores")
    if len(answer) != count:
        raise AnswerError(f"returned {len(answer)} scores for {count} samples")
    return [_read_one(value, lengths[row] if lengths else None) for row, value in enumerate(answer)]


def _read_one(value: Any, length: int | None) -> Score | NoScore:
    value = _plain(value)
    if isinstance(value, NoScore):
        return value
    if not isinstance(value, list | tuple):
        number = _number(value)
        return NoScore(f"got {_shown(value)}, {_not_a_score(value)}") if number is None else number
    if length is not None and len(value) != length:
        return NoScore(f"got {len(value)} per-token rewards, but its response has {length} tokens")
    if length is None and not value:
        return NoScore("got an empty list, which has no reward")
    rewards: list[float] = []
    for token, reward in enumerate(value):
        number = _number(_plain(reward))
        if number is None:
            return NoScore(f"got {_shown(reward)} for token {token}, {_not_a_score(_plain(reward))}")
        rewards.append(number)
    return rewards


def _plain(value: Any) -> Any:
    """Convert arrays, tensors and their scalars to Python lists and numbers, without importing their libraries."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) and not isinstance(value, type) else value


def _number(value: Any) -> float | None:
    """Return a finite float, or None. Text is never a number, even where Python could parse it as one."""
    if isinstance(value, str | bytes | bytearray | complex) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (ArithmeticError, TypeError, ValueError):
        return None
    return number if abs(number) <= LARGEST else None


def _not_a_score(value: Any) -> str:
    huge = isinstance(value, int | float) and abs(value) > LARGEST and value not in (float("inf"), -float("inf"))
    return f"more than {LARGEST:g} in size" if huge else "not a finite number"


def is_number(value: object) -> bool:
    """Return whether a value read from JSON can be a score."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _shown(value: Any) -> str:
    if value is None or isinstance(value, float):
        return str(value)
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} ({type(value).__name__})"
