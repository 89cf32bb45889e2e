"""Arithmetic in texts: finds the last expression and computes it exactly, within bounds, without evaluating code."""

from __future__ import annotations

import math
import re
from fractions import Fraction

Number = Fraction | float

_MAX_BITS = 20_000
"""Maximum bits of a numerator or denominator on the way."""
_LONGEST = 8000
"""Characters of the end of a text that are read."""
_MAX_TOKENS = 400
_DEEPEST = 60

_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00f7": "/", "\u00b7": "*", "\u22c5": "*"})
_LATEX = (
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:left|right)\b|\\[,!; ]|\$"), ""),
    (re.compile(r"\^\{([^{}]*)\}"), r"^(\1)"),
)
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)|(?P<sign>//|\*\*|[-+*/%^()])|\s+"
)
_BINARY = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2}


class _NotAnExpressionError(Exception):
    """The tokens have no value."""


def last_value(text: str) -> Number | None:
    """Return the value of the last number or expression in a text, or None if there is none."""
    text = text[-_LONGEST:].translate(_SIGNS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for run in reversed(_runs(text)):
        if any(token[0].isdigit() or token[0] == "." for token in run):
            return _value_of_end(run)
    return None


def value_of(number: float) -> Number | None:
    """Return a number as it is computed with: exactly, as its shortest decimals say."""
    if isinstance(number, float) and not math.isfinite(number):
        return None
    return Fraction(str(number)) if isinstance(number, float) else Fraction(number)


def equal(one: Number, other: Number, tolerance: float) -> bool:
    """Return whether two numbers are the same but for a relative tolerance."""
    if one == other:
        return True
    try:
        return math.isclose(float(one), float(other), rel_tol=tolerance)
    except OverflowError:
        return False


def _runs(text: str) -> list[list[str]]:
    """Return the stretches of a text that are made of numbers, signs and parentheses, as tokens."""
    runs: list[list[str]] = [[]]
    end = 0
    for match in _TOKEN.finditer(text):
        glued = match["number"] is not None and match.start() > 0 and (text[match.start() - 1].isalpha())
        if match.start() > end or glued:
            runs.append([])
        end = match.end()
        if not match[0].isspace() and not glued:
            runs[-1].append(match[0])
        if "\n" in match[0]:
            runs.append([])
    return [run for run in runs if run]


def _value_of_end(run: list[str]) -> Number | None:
    """Return the value of the longest end of a run that is an expression. Signs after it, and parentheses that were
    opened before the run, do not count."""
    run = _without_unmatched_end(run[-_MAX_TOKENS:])
    for start in range(len(run)):
        try:
            return _Parser(run[start:]).value()
        except _NotAnExpressionError:
            continue
        except (ArithmeticError, ValueError):
            return None
    return None


def _without_unmatched_end(run: list[str]) -> list[str]:
    """Return a run up to its last number or parenthesis that closes another, without the % of a percentage in
    parentheses."""
    kept: list[str] = []
    end = depth = 0
    for token, following in zip(run, [*run[1:], ""], strict=True):
        if token == "%" and following == ")":
            continue
        kept.append(token)
        if token[0].isdigit() or token[0] == "." or (token == ")" and depth):
            end = len(kept)
        depth = max(0, depth + (token == "(") - (token == ")"))
    return kept[:end]


class _Parser:
    """A recursive descent over tokens, which computes as it reads."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._index, self._depth = tokens, 0, 0

    def value(self) -> Number:
        value = self._sum(1)
        if self._index < len(self._tokens):
            raise _NotAnExpressionError
        return value

    def _next(self) -> str:
        return self._tokens[self._index] if self._index < len(self._tokens) else ""

    def _sum(self, level: int) -> Number:
        """Read terms joined by + and - (level 1), or factors joined by * / // % (level 2)."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NotAnExpressionError
        value = self._sum(2) if level == 1 else self._signed()
        while _BINARY.get(sign := self._next()) == level:
            self._index += 1
            value = _combine(sign, value, self._sum(2) if level == 1 else self._signed())
        self._depth -= 1
        return value

    def _signed(self) -> Number:
        sign = 1
        while self._next() in ("-", "+"):
            sign = -sign if self._next() == "-" else sign
            self._index += 1
        return sign * self._power()

    def _power(self) -> Number:
        base = self._atom()
        if self._next() not in ("**", "^"):
            return base
        self._index += 1
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NotAnExpressionError
        exponent = self._signed()
        self._depth -= 1
        return _to_the_power(base, exponent)

    def _atom(self) -> Number:
        token = self._next()
        self._index += 1
        if token == "(":
            value = self._sum(1)
            if self._next() != ")":
                raise _NotAnExpressionError
            self._index += 1
            return value
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise _NotAnExpressionError
        mantissa, _, exponent = token.lower().replace(",", "").partition("e")
        if len(mantissa) > _MAX_BITS // 4 or abs(int(exponent or 0)) > _MAX_BITS // 4:
            raise OverflowError
        return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _combine(sign: str, left: Number, right: Number) -> Number:
    if sign == "+":
        return _bounded(left + right)
    if sign == "-":
        return _bounded(left - right)
    if sign == "*":
        return _bounded(left * right)
    if sign == "/":
        return _bounded(left / right)
    return _bounded(Fraction(left // right) if sign == "//" else left % right)


def _to_the_power(base: Number, exponent: Number) -> Number:
    whole = int(exponent)
    if isinstance(base, float) or isinstance(exponent, float) or exponent != whole:
        value = float(base) ** float(exponent)
        if isinstance(value, complex):
            raise ValueError("a root of a negative number")
        return _bounded(value)
    bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base != 0 and abs(whole) * max(1, bits - 1) > _MAX_BITS:
        raise OverflowError
    return _bounded(base ** (whole if abs(base) != 1 else whole % 2))


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError
    elif max(abs(value.numerator).bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise OverflowError
    return value
