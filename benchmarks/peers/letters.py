"""The reward of benchmarks/grpo.py: how often a letter occurs in a response."""

from collections.abc import Sequence


def count(outputs: Sequence[str], letter: str, **_: object) -> list[float]:
    return [float(output.count(letter)) for output in outputs]
