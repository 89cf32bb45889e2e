"""The reward of benchmarks/grpo.py: how often a letter occurs in a response, times what one is worth."""

from collections.abc import Sequence


def count(outputs: Sequence[str], letter: str, worth: float = 1.0, **_: object) -> list[float]:
    return [worth * output.count(letter) for output in outputs]
