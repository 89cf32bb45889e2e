"""Rewards and data of the recorded runs (runs.json): some for good runs, most to make a run bad on purpose."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from megarl.tasks.randomwalks import optimality

SLOW = 6.0  # seconds of a call: twelve phases wait for more than a minute


def constant(outputs: Sequence[str], **_: object) -> list[float]:
    return [0.5 for _ in outputs]


def length(outputs: Sequence[str], **_: object) -> list[float]:
    return [len(output) / 9 for output in outputs]


def failing(outputs: Sequence[str], **_: object) -> list[float | None]:
    """No score for what begins with one of five letters."""
    return [None if output.startswith(tuple("abcde")) else len(output) / 9 for output in outputs]


def slow(**given: Any) -> list[float]:
    time.sleep(SLOW)
    return optimality(**given)


def powers(**given: Any) -> list[float]:
    """Rewards of very different size: from 1 for the worst walk to 10,000 for the best."""
    return [float(10 ** (4 * one)) for one in optimality(**given)]


def pairs(seed: int = 0) -> list[dict[str, Any]]:
    """Right and wrong sums."""
    return [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in _sums(seed)]


def labels(seed: int = 0) -> list[dict[str, Any]]:
    """The same, each a right or a wrong one."""
    return [
        {"prompt": prompt, "completion": right if index % 2 else wrong, "label": bool(index % 2)}
        for index, (prompt, right, wrong) in enumerate(_sums(seed))
    ]


def few(seed: int = 0) -> list[dict[str, Any]]:
    """Letters at random, of which nothing can be learned but by heart."""
    chance = random.Random(seed)
    return [{"text": "".join(chance.choice("abcdefgh ") for _ in range(40))} for _ in range(16)]


def held_out_pairs() -> list[dict[str, Any]]:
    return pairs(1)[:100]


def held_out_labels() -> list[dict[str, Any]]:
    return labels(1)[:100]


def held_out_few() -> list[dict[str, Any]]:
    return few(1)


def _sums(seed: int) -> list[tuple[str, str, str]]:
    chance = random.Random(seed)
    found = []
    for _ in range(500):
        a, b = chance.randrange(10), chance.randrange(10)
        wrong = (a + b + chance.randrange(1, 9)) % 19
        found.append((f"{a} + {b} = ", str(a + b), str(wrong)))
    return found
