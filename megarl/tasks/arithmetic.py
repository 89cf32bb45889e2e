"""The arithmetic task: sums of numbers, for the preset `arithmetic`.

The answer is written from its last digit to its first, so that a carry is known before the digit that needs it: the
prompt `17+25=` has the answer `24`, which is 42 reversed. All numbers have the same count of digits. A question of
`held_out` is not in `prompts` or `demonstrations`, in any order of its terms.

Everything follows from the options (`data.options`), which are the same for all three functions: `seed`, `digits` of a
number, `terms` of a sum, and `noise`, the share of demonstrations whose answer has a wrong digit. `correct` is the
reward function. A prompt has `terms * (digits + 1)` characters and an answer at most `digits + 1`, which
`model.max_positions` and `rollout.max_new_tokens` must have room for, with one more for the EOS.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from megarl.tasks.options import share, whole_number

DRAWS, TRAIN, HELD_OUT = 20_000, 4_000, 200
Terms = tuple[int, ...]


def prompts(seed: int = 1, digits: int = 2, terms: int = 2, noise: float = 0.6) -> list[dict[str, Any]]:
    """Return the questions to train on, up to 4000."""
    return [_record(question) for question in _questions(*_checked(seed, digits, terms, noise))[0]]


def held_out(seed: int = 1, digits: int = 2, terms: int = 2, noise: float = 0.6) -> list[dict[str, Any]]:
    """Return the questions to evaluate on: 200, or a fifth where there are fewer than 1000."""
    return [_record(question) for question in _questions(*_checked(seed, digits, terms, noise))[1]]


def demonstrations(seed: int = 1, digits: int = 2, terms: int = 2, noise: float = 0.6) -> list[dict[str, str]]:
    """Return the questions to train on with an answer each, for behaviour cloning. A share `noise` of the answers has
    one wrong digit."""
    questions = _questions(*_checked(seed, digits, terms, noise))[0]
    draw = random.Random(f"demonstrations {seed}")
    found = []
    for question in questions:
        answer = answer_of(question)
        if draw.random() < noise:
            place = draw.randrange(len(answer))
            wrong = draw.choice([digit for digit in "0123456789" if digit != answer[place]])
            answer = answer[:place] + wrong + answer[place + 1 :]
        found.append({"prompt": _prompt(question), "completion": answer})
    return found


def correct(outputs: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    """Score responses with 1 if they are the record's `answer`, else 0: the reward function
    `reward.fn=megarl.tasks.arithmetic:correct`."""
    return [float(output == right) for output, right in zip(outputs, answer, strict=True)]


def answer_of(terms: Terms) -> str:
    """Return the sum of the terms, from its last digit to its first."""
    return str(sum(terms))[::-1]


def _record(terms: Terms) -> dict[str, Any]:
    return {"prompt": _prompt(terms), "answer": answer_of(terms)}


def _prompt(terms: Terms) -> str:
    return "+".join(map(str, terms)) + "="


def _checked(seed: object, digits: object, terms: object, noise: object) -> tuple[int, int, int]:
    share("noise", noise)
    return (
        whole_number("seed", seed, 0, 2**32 - 1),
        whole_number("digits", digits, 1, 9),
        whole_number("terms", terms, 2, 9),
    )


@cache
def _questions(seed: int, digits: int, terms: int) -> tuple[list[Terms], list[Terms]]:
    """Return the questions to train on and to evaluate on."""
    draw = random.Random(f"questions {seed}")
    numbers = range(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    drawn = list(dict.fromkeys(tuple(draw.choice(numbers) for _ in range(terms)) for _ in range(DRAWS)))
    in_any_order = list(dict.fromkeys(tuple(sorted(question)) for question in drawn))
    kept_back = set(in_any_order[: min(HELD_OUT, len(in_any_order) // 5)])
    train = [question for question in drawn if tuple(sorted(question)) not in kept_back]
    first = {tuple(sorted(question)): question for question in reversed(drawn)}
    return train[:TRAIN], [first[question] for question in in_any_order[: len(kept_back)]]
