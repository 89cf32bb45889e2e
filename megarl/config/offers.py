"""Errors of rules for several keys, and the nearest values that satisfy the rules."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megarl.errors import ConfigError

Rule = Callable[[Any, int], None]
"""A check of several keys. It takes a typed configuration and the world size, and raises `Refusal`."""
_LONGEST_SEARCH = 100_000


class Refusal(ConfigError):  # noqa: N818 - it becomes an error, with advice, in `enforce`
    """The error of a rule, with values that may satisfy it.

    Args:
        problem: the keys, their values and why they cannot be combined.
        offers: candidates per dotted key; `enforce` shows the nearest of those that work.
        otherwise: a remedy in words, added after the offers.
        key: the key that is refused.
        value: the value it has.
    """

    def __init__(
        self,
        problem: str,
        offers: Mapping[str, Iterable[Any]] | None = None,
        otherwise: str | None = None,
        *,
        key: str,
        value: Any = None,
    ) -> None:
        super().__init__(problem, key=key, value=value, offers=offers)
        self.problem = problem
        self.otherwise = otherwise


def enforce(rules: Sequence[Rule], config: Any, world_size: int) -> None:
    """Apply rules in order. The first refusal becomes a `ConfigError` with the values that work.

    A value is offered if it satisfies the rule that refused and all rules before it.
    """
    for index, rule in enumerate(rules):
        try:
            rule(config, world_size)
        except Refusal as refusal:
            offers = {
                key: working
                for key, values in refusal.offers.items()
                if (working := _working(key, values, rules[: index + 1], config, world_size))
            }
            remedies = [f"{key}={either(working)}" for key, working in offers.items()]
            if refusal.otherwise:
                remedies.append(refusal.otherwise)
            advice = f": use {', or '.join(remedies)}" if remedies else ""
            raise ConfigError(refusal.problem + advice, key=refusal.key, value=refusal.value, offers=offers) from None


def require_divides(key: str, whole_key: str, value: int, whole: int) -> None:
    """Refuse a value of `key` that does not divide the value of `whole_key`; offer other values of both."""
    if whole % value:
        raise Refusal(
            f"{key}={value} does not divide {whole_key}={whole}",
            {key: divisors(whole), whole_key: multiples(value, whole)},
            key=key,
            value=value,
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending; above 10**10, only those that a short search finds."""
    small = [i for i in range(1, min(math.isqrt(number), _LONGEST_SEARCH) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def multiples(step: int, number: int) -> list[int]:
    """Return the positive multiples of `step` at or just below `number`, and just above it."""
    below = number // step * step
    return [value for value in (below, below + step) if value > 0]


def near(values: Iterable[Any], target: float, count: int = 4) -> list[Any]:
    """Return the `count` values nearest to a target, ascending."""
    return sorted(sorted(set(values), key=lambda value: (abs(value - target), value))[:count])


def either(values: Iterable[Any]) -> str:
    """Return alternatives for a sentence: 1, 2 or 4."""
    words = [json.dumps(value) if value is None or isinstance(value, bool) else str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def read(config: Any, key: str) -> Any:
    """Return the value of a dotted key in a typed tree; None if its section is None."""
    for part in key.split("."):
        config = None if config is None else getattr(config, part)
    return config


def _working(key: str, values: list[Any], rules: Sequence[Rule], config: Any, world_size: int) -> list[Any]:
    """Return the nearest candidates with which the configuration satisfies all of the rules."""
    section, _, name = key.rpartition(".")
    current = read(config, key)
    working = []
    for value in values:
        trial, world = copy.deepcopy(config), world_size
        if key == "trainer.devices":
            world = value * config.trainer.num_nodes
        setattr(read(trial, section) if section else trial, name, value)
        try:
            for rule in rules:
                rule(trial, world)
        except Refusal:
            continue
        working.append(value)
    numbers = [value for value in working if isinstance(value, int | float) and not isinstance(value, bool)]
    return near(numbers, current or 0) if numbers else working
