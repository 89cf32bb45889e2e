"""What a sweep varies: a key and its distribution, `loguniform(1e-5,1e-3)`, and values as points between 0 and 1."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.disk import shown
from megarl.errors import ConfigError

FORMS = "choice(a,b), uniform(0,1), loguniform(1e-5,1e-3), int(1,8), logint(16,1024)"
_CALL = re.compile(r"\s*([a-z_]+)\s*\((.*)\)\s*", re.DOTALL)


@dataclass(frozen=True)
class Space:
    """The values of one key.

    Attributes:
        key: the configuration key.
        kind: choice, uniform, loguniform, int or logint.
        choices: the values of a choice, as they are written on a command line.
        low, high: the bounds of the others, both included.
    """

    key: str
    kind: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    def value(self, point: float) -> str:
        """Return the value at a point from 0 to 1, as it is written on a command line."""
        if self.kind == "choice":
            return self.choices[min(int(point * len(self.choices)), len(self.choices) - 1)]
        if self.kind in ("int", "logint"):
            # Every integer has a share of its own of the points, the first and the last a whole one.
            low, high = self.low - 0.5, self.high + 0.5
            found = _between(low, high, point, self.kind == "logint")
            return str(min(max(round(found), int(self.low)), int(self.high)))
        return f"{_between(self.low, self.high, point, self.kind == 'loguniform'):.6g}"

    def point(self, value: str) -> float:
        """Return a point whose value this is."""
        if self.kind == "choice":
            return (self.choices.index(value) + 0.5) / len(self.choices)
        wide = 0.5 if self.kind in ("int", "logint") else 0.0
        low, high, found = self.low - wide, self.high + wide, float(value)
        if self.kind in ("loguniform", "logint"):
            low, high, found = math.log(low), math.log(high), math.log(found)
        return 0.5 if high == low else min(max((found - low) / (high - low), 0.0), 1.0)

    def grid(self, points: int) -> list[str]:
        """Return the values of a grid: all choices, else at most `points` values from the first bound to the last."""
        if self.kind == "choice":
            return list(self.choices)
        whole, log = self.kind in ("int", "logint"), self.kind in ("loguniform", "logint")
        steps = [0.5] if points == 1 else [index / (points - 1) for index in range(points)]
        values = [_between(self.low, self.high, step, log) for step in steps]
        return list(dict.fromkeys(str(round(value)) if whole else f"{value:.6g}" for value in values))


def _between(low: float, high: float, point: float, log: bool) -> float:
    return math.exp(math.log(low) + point * (math.log(high) - math.log(low))) if log else low + point * (high - low)


def parse_space(key: str, text: str) -> Space:
    """Return the space that a text such as `choice(1,2)` describes."""
    found = _CALL.fullmatch(text)
    kinds = ("choice", "uniform", "loguniform", "int", "logint")
    if found is None or found[1] not in kinds:
        raise _refusal(key, text, f"is not a distribution: use one of {FORMS}")
    kind, inner = found[1], found[2]
    if kind == "choice":
        choices = split_choices(inner)
        if not choices or len(set(choices)) < len(choices):
            raise _refusal(key, text, "needs values that differ, as in choice(0.1,0.2)")
        return Space(key, kind, tuple(choices))
    try:
        low, high = (float(part) for part in inner.split(","))
    except ValueError:
        raise _refusal(key, text, f"needs two numbers, as in {kind}({'1,8' if 'int' in kind else '0.1,1'})") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise _refusal(key, text, "needs two finite numbers, the smaller one first")
    if "log" in kind and low <= 0:
        raise _refusal(key, text, "needs bounds above 0, as it is even over the logarithm")
    if "int" in kind and not (low.is_integer() and high.is_integer()):
        raise _refusal(key, text, "needs integers as bounds")
    return Space(key, kind, low=low, high=high)


def _refusal(key: str, text: str, why: str) -> ConfigError:
    return ConfigError(f"sweep.{key}={shown(text)} {why}", key=f"sweep.{key}", value=text)


def split_choices(text: str) -> list[str]:
    """Split a list at the commas that are not inside brackets or quotes."""
    parts, depth, quote, begun = [], 0, "", 0
    for index, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[begun:index])
            begun = index + 1
    parts.append(text[begun:])
    return [part.strip() for part in parts if part.strip()]


def settings_at(spaces: Sequence[Space], points: Sequence[float]) -> dict[str, str]:
    """Return the settings at a point of the unit cube, by key."""
    return {space.key: space.value(point) for space, point in zip(spaces, points, strict=True)}


def points_of(spaces: Sequence[Space], settings: Mapping[str, Any]) -> list[float]:
    """Return the point of the unit cube that settings stand for."""
    return [space.point(str(settings[space.key])) for space in spaces]


def grid(spaces: Sequence[Space], points: int) -> Iterator[dict[str, str]]:
    """Yield every combination of the spaces' grids, the last key varying fastest."""
    for values in itertools.product(*(space.grid(points) for space in spaces)):
        yield dict(zip((space.key for space in spaces), values, strict=True))
