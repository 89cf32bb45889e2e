"""The countdown task: build an expression with a given value from given numbers, for the preset `countdown`.

The prompt `3 5 7>22=` asks for an expression that uses each of the numbers 3, 5 and 7 exactly once and has the value
22, such as `3*5+7`. Expressions have `+`, `-`, `*`, `/` and parentheses; division is exact (fractions are allowed).
Every problem has a solution: its target is the value of an expression that was drawn, with `+`, `-` and `*` between the
numbers as they stand in the prompt. Demonstrations are such expressions, which have fewer forms to learn; any other
solution scores as much. No problem of `held_out`, in any order of its numbers, is in `prompts` or `demonstrations`.

Everything follows from the options (`data.options`), which are the same for all three functions: `seed`, `numbers` of
a problem, `largest` number, and `noise`, the share of demonstrations with random operators. `solved` is the reward
function. With n numbers of up to w digits, a prompt has at most `n * (w + 1) + 3` characters and a solution without
parentheses at most `n * (w + 1) - 1`, which `model.max_positions` and `rollout.max_new_tokens` must have room for, with
one more for the EOS.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from megarl.tasks.options import share, whole_number

DRAWS, TRAIN, HELD_OUT, LARGEST_TARGET = 20_000, 4_000, 200, 99
_TOKEN = re.compile(r"\d+|[-+*/()]")
_OPERATORS: dict[str, tuple[int, Callable[[Fraction, Fraction], Fraction]]] = {
    "+": (1, lambda left, right: left + right),
    "-": (1, lambda left, right: left - right),
    "*": (2, lambda left, right: left * right),
    "/": (2, lambda left, right: left / right),
}
"""Precedence and meaning of each operator."""


def prompts(seed: int = 1, numbers: int = 3, largest: int = 9, noise: float = 0.6) -> list[dict[str, Any]]:
    """Return the problems to train on, up to 4000."""
    return [_record(*problem) for problem, _ in _problems(*_checked(seed, numbers, largest, noise))[0]]


def held_out(seed: int = 1, numbers: int = 3, largest: int = 9, noise: float = 0.6) -> list[dict[str, Any]]:
    """Return the problems to evaluate on: 200, or a fifth where there are fewer than 1000."""
    return [_record(*problem) for problem, _ in _problems(*_checked(seed, numbers, largest, noise))[1]]


def demonstrations(seed: int = 1, numbers: int = 3, largest: int = 9, noise: float = 0.6) -> list[dict[str, str]]:
    """Return the problems to train on with an expression each, for behaviour cloning. A share `noise` of the
    expressions has random operators, and mostly another value."""
    problems = _problems(*_checked(seed, numbers, largest, noise))[0]
    draw = random.Random(f"demonstrations {seed}")
    found = []
    for (given, target), expression in problems:
        if draw.random() < noise:
            expression = _expression(draw, given)
        found.append({"prompt": _prompt(given, target), "completion": expression})
    return found


def solved(outputs: Sequence[str], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: object) -> list[float]:
    """Score responses with 1 if they are an expression of the record's `numbers` with the value `target`, else 0: the
    reward function `reward.fn=megarl.tasks.countdown:solved`."""
    return [
        float(solves(output, given, wanted)) for output, given, wanted in zip(outputs, numbers, target, strict=True)
    ]


def solves(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Return whether an expression uses each number exactly once and has the target's value."""
    used = sorted(number.lstrip("0") or "0" for number in re.findall(r"\d+", expression))
    if used != sorted(map(str, numbers)):  # compared as texts: no huge number is ever computed with
        return False
    return value_of(expression) == target


def value_of(expression: str) -> Fraction | None:
    """Return the value of an expression; None for what is not one, and for a division by zero.

    Dijkstra's shunting-yard algorithm: operators wait on a stack until one that binds less follows. Nothing is
    evaluated as Python.
    """
    if _TOKEN.sub("", expression).strip():
        return None
    values: list[Fraction] = []
    waiting: list[str] = []
    wants_value = True  # a number or an opening parenthesis comes next, not an operator
    for token in _TOKEN.findall(expression):
        if (token.isdigit() or token == "(") != wants_value:
            return None
        if token.isdigit():
            values.append(Fraction(int(token)))
            wants_value = False
        elif token == "(":
            waiting.append(token)
        else:
            binds = _OPERATORS[token][0] if token in _OPERATORS else 0
            while waiting and waiting[-1] != "(" and _OPERATORS[waiting[-1]][0] >= binds:
                if not _apply(waiting.pop(), values):
                    return None
            if token == ")":
                if not waiting:
                    return None
                waiting.pop()
            else:
                waiting.append(token)
                wants_value = True
    if wants_value:
        return None
    while waiting:
        operator = waiting.pop()
        if operator == "(" or not _apply(operator, values):
            return None
    return values[0]


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Replace the last two values by what the operator makes of them; return False for a division by zero."""
    right, left = values.pop(), values.pop()
    if operator == "/" and right == 0:
        return False
    values.append(_OPERATORS[operator][1](left, right))
    return True


def _record(numbers: tuple[int, ...], target: int) -> dict[str, Any]:
    return {"prompt": _prompt(numbers, target), "numbers": list(numbers), "target": target}


def _prompt(numbers: Sequence[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))}>{target}="


def _checked(seed: object, numbers: object, largest: object, noise: object) -> tuple[int, int, int]:
    share("noise", noise)
    return (
        whole_number("seed", seed, 0, 2**32 - 1),
        whole_number("numbers", numbers, 2, 6),
        whole_number("largest", largest, 2, 99),
    )


Problem = tuple[tuple[int, ...], int]


@cache
def _problems(seed: int, numbers: int, largest: int) -> tuple[list[tuple[Problem, str]], list[tuple[Problem, str]]]:
    """Return the problems to train on and to evaluate on, each with a solution."""
    draw = random.Random(f"problems {seed}")
    drawn: dict[Problem, str] = {}
    for _ in range(DRAWS):
        given = tuple(draw.randint(1, largest) for _ in range(numbers))
        expression = _expression(draw, given)
        value = value_of(expression)
        if value is not None and 0 < value <= LARGEST_TARGET:
            drawn.setdefault((given, int(value)), expression)
    kinds = list(dict.fromkeys(map(_in_any_order, drawn)))
    kept_back = set(kinds[: min(HELD_OUT, len(kinds) // 5)])
    train = [(problem, text) for problem, text in drawn.items() if _in_any_order(problem) not in kept_back]
    held: dict[Problem, tuple[Problem, str]] = {}
    for problem, text in drawn.items():
        if _in_any_order(problem) in kept_back:
            held.setdefault(_in_any_order(problem), (problem, text))
    return train[:TRAIN], list(held.values())


def _in_any_order(problem: Problem) -> Problem:
    return tuple(sorted(problem[0])), problem[1]


def _expression(draw: random.Random, numbers: Sequence[int]) -> str:
    """Return the numbers in their order, with +, - or * between two neighbours."""
    return str(numbers[0]) + "".join(draw.choice("+-*") + str(number) for number in numbers[1:])
