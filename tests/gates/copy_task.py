"""A task for models that read and write: a prompt is three words, the answer is the second of them.

The samples to clone, or to learn values from, are right as often as not: the answer is the second word in half of them,
and the first or the third in the others.
"""

from __future__ import annotations

from random import Random
from typing import Any

LETTERS = "abcdefgh"
LEAST, MOST = 2, 4  # letters of a word
RIGHT = 0.5  # share of the samples with the right answer


def prompts(count: int = 20_000) -> list[dict[str, str]]:
    """Return prompts to answer, each with its right answer."""
    random = Random(2)
    return [_record(words) for words in (_words(random) for _ in range(count)) if not _is_held_out(words)]


def held_out(count: int = 256) -> list[dict[str, str]]:
    """Return prompts to evaluate on, none of which are in `prompts` or `samples`."""
    random, found = Random(3), list[dict[str, str]]()
    while len(found) < count:
        words = _words(random)
        if _is_held_out(words):
            found.append(_record(words))
    return found


def samples(count: int = 40_000) -> list[dict[str, str]]:
    """Return prompts with completions, of which half are right."""
    random, found = Random(1), list[dict[str, str]]()
    for _ in range(count):
        words = _words(random)
        answer = words[1] if random.random() < RIGHT else random.choice((words[0], words[2]))
        if not _is_held_out(words):
            found.append({"prompt": "_".join(words), "completion": answer})
    return found


def rated() -> list[dict[str, Any]]:
    """Return `samples` with rewards: 1 for the second word, else 0."""
    return [
        {"samples": [prompt, completion], "rewards": float(completion == prompt.split("_")[1])}
        for prompt, completion in ((record["prompt"], record["completion"]) for record in samples())
    ]


def exact(outputs: list[str], answer: list[str], **_: object) -> list[float]:
    """Score 1 for the second word, 0 for all else."""
    return [float(output == wanted) for output, wanted in zip(outputs, answer, strict=True)]


def _words(random: Random) -> list[str]:
    return ["".join(random.choices(LETTERS, k=random.randint(LEAST, MOST))) for _ in range(3)]


def _record(words: list[str]) -> dict[str, str]:
    return {"prompt": "_".join(words), "answer": words[1]}


def _is_held_out(words: list[str]) -> bool:
    """Whether a prompt is for evaluation: one in sixteen, by its letters alone."""
    return sum(map(ord, "_".join(words))) % 16 == 0
