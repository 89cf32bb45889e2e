"""Ready-made reward functions, each a plain function over the texts and the fields of the prompt records.

Options are keyword arguments (`reward.options`, or `functools.partial`); fields that are not asked for are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.rewards.words import NEGATIONS, NEGATIVE, POSITIVE

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?"  # a sign, unless it stands between two terms, as in 7-3
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?"
    r"(?:(?<=\d)[eE][-+]?\d+)?"
)
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*|[.!?;,:]")
_NEGATION_REACH = 3


def length(
    outputs: Sequence[str],
    tokenizer: Any = None,
    *,
    target_length: float | None = None,
    unit: str = "characters",
    **_: Any,
) -> list[float]:
    """How long the response is, or how close to a length.

    Args:
        target_length: with it, the score is -|length - target| / target, 0 at best; without it, the length.
        unit: characters, words (between white space) or tokens.
    """
    if unit not in ("characters", "words", "tokens"):
        raise ValueError(f"option unit={unit!r}: use characters, words or tokens")
    if target_length is not None and not _option_number("target_length", target_length) > 0:
        raise ValueError(f"option target_length={target_length}: use a number above 0")
    if unit == "characters":
        lengths = [len(output) for output in outputs]
    elif unit == "words":
        lengths = [len(output.split()) for output in outputs]
    else:
        lengths = [len(tokenizer.encode(output)) for output in outputs]
    if target_length is None:
        return [float(count) for count in lengths]
    return [-abs(count - target_length) / target_length for count in lengths]


def regex(
    outputs: Sequence[str],
    *,
    pattern: str | None = None,
    mode: str = "search",
    ignore_case: bool = False,
    **_: Any,
) -> list[float]:
    """1 where the response matches a regular expression, else 0.

    Args:
        pattern: Python's regular expressions; a dot matches line ends too.
        mode: search (anywhere), fullmatch (the whole response without white space around it), or count (the number
            of matches, instead of 1).
        ignore_case: take capital and small letters as equal.
    """
    expression = re.compile(_option_text("pattern", pattern), re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    if mode == "search":
        return [float(expression.search(output) is not None) for output in outputs]
    if mode == "fullmatch":
        return [float(expression.fullmatch(output.strip()) is not None) for output in outputs]
    if mode == "count":
        return [float(sum(1 for _ in expression.finditer(output))) for output in outputs]
    raise ValueError(f"option mode={mode!r}: use search, fullmatch or count")


def exact_match(
    outputs: Sequence[str], *, field: str = "answer", ignore_case: bool = False, **metadata: Any
) -> list[float]:
    """1 where the response is the answer, else 0; white space around either, and its kind inside, does not count.

    Args:
        field: field of the prompt records that holds the answer, or a list of answers of which any will do.
        ignore_case: take capital and small letters as equal.
    """

    def normal(text: object) -> str:
        joined = " ".join(str(text).split())
        return joined.casefold() if ignore_case else joined

    return [
        float(normal(output) in {normal(answer) for answer in _any_of(answers)})
        for output, answers in zip(outputs, _column(metadata, field, "exact_match"), strict=True)
    ]


def numeric_match(
    outputs: Sequence[str], *, field: str = "answer", tolerance: float = 1e-9, **metadata: Any
) -> list[float]:
    """1 where the last number of the response is the answer, else 0.

    Numbers may have a sign, a fraction, an exponent and commas between thousands.

    Args:
        field: field of the prompt records that holds the answer: a number, or a text whose last number is meant.
        tolerance: how far the two may differ, relative to the larger.
    """
    _option_number("tolerance", tolerance)
    scores = []
    for row, (output, answer) in enumerate(zip(outputs, _column(metadata, field, "numeric_match"), strict=True)):
        wanted = last_number(str(answer))
        if wanted is None:
            raise ValueError(f"the {field} of sample {row} is {answer!r}, which holds no number")
        found = last_number(output)
        scores.append(float(found is not None and math.isclose(found, wanted, rel_tol=tolerance)))
    return scores


def last_number(text: str) -> float | None:
    """The last number written in a text, or None if there is none that is finite."""
    written = [match for match in _NUMBER.findall(text.replace("\u2212", "-")) if _DIGIT.search(match)]
    if not written:
        return None
    number = float(written[-1].replace(",", ""))
    return number if math.isfinite(number) else None


def json_valid(outputs: Sequence[str], *, required_keys: Sequence[str] = (), **_: Any) -> list[float]:
    """1 where the response is one JSON value and nothing else, else 0.

    Args:
        required_keys: keys that the value, which must then be an object, needs to have.
    """
    if isinstance(required_keys, str):
        raise ValueError(f"option required_keys={required_keys!r}: use a list of keys")
    return [float(_is_json(output, required_keys)) for output in outputs]


def sentiment(outputs: Sequence[str], **_: Any) -> list[float]:
    """How pleased the response sounds, between -1 and 1: (pleased - displeased) / (pleased + displeased + 1) words.

    A word up to three words after a negation in the same clause counts as its opposite.
    """
    return [_sentiment(output) for output in outputs]


def _sentiment(text: str) -> float:
    pleased = displeased = 0
    since_negation = _NEGATION_REACH
    for word in _WORD.findall(text.lower().replace("\u2019", "'")):
        plain = word.replace("'", "")
        if plain in NEGATIONS:
            since_negation = 0
            continue
        if not plain.isalpha():  # punctuation ends the clause
            since_negation = _NEGATION_REACH
            continue
        sign = (plain in POSITIVE) - (plain in NEGATIVE)
        if sign and since_negation < _NEGATION_REACH:
            sign = -sign
        pleased += sign > 0
        displeased += sign < 0
        since_negation += 1
    return (pleased - displeased) / (pleased + displeased + 1)


def _is_json(text: str, required_keys: Sequence[str]) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return not required_keys or (isinstance(value, dict) and all(key in value for key in required_keys))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _column(metadata: Mapping[str, Any], field: str, function: str) -> Sequence[Any]:
    if field not in metadata:
        raise KeyError(
            f"{function} needs the field {field!r} of the prompt records, which have "
            f"{', '.join(metadata) or 'no other fields'}; set its option field"
        )
    column: Sequence[Any] = metadata[field]
    return column


def _any_of(answers: object) -> Sequence[object]:
    return answers if isinstance(answers, list | tuple) else [answers]


def _option_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_option(name, value, "a number")
    return value


def _option_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong_option(name, value, "a text")
    return value


def _wrong_option(name: str, value: object, wants: str) -> ValueError:
    if value is None:
        return ValueError(f"option {name} is not set; it is {wants}")
    also = "; the prompt records have a field of that name, which a set option overrides" * isinstance(value, list)
    return ValueError(f"option {name} is a {type(value).__name__}, not {wants}{also}")
