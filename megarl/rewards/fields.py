"""What reward functions need of their arguments: fields of the records, options, texts.

`builtin.py` has its own of these. Its text stays as it is: a checkpoint's moments of scores belong to the text of the
file that scored them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

RESERVED = ("samples", "prompts", "outputs", "tokenizer")
"""Arguments that every reward function is given; no field of the prompt records may have such a name."""


def column_of(metadata: Mapping[str, Any], field: str, function: str) -> Sequence[Any]:
    """Return a field of the prompt records, with a value for each sample."""
    if field not in metadata:
        fields = [name for name in metadata if name not in RESERVED]
        raise KeyError(
            f"{function} needs the field {field!r} of the prompt records, which have "
            f"{', '.join(fields) or 'no other fields'}; name the field to read with reward.options.field"
        )
    column: Sequence[Any] = metadata[field]
    return column


def option_number(name: str, value: object) -> float:
    """Return the value of an option that must be a number."""
    if value is None:
        raise ValueError(f"option {name} is not set; it is a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        also = "; the prompt records have a field of that name, which a set option overrides"
        raise ValueError(
            f"option {name} is a {type(value).__name__}, not a number{also if isinstance(value, list) else ''}"
        )
    return value


def positive_number(name: str, value: object) -> float:
    """Return the value of an option that must be a number above 0."""
    if not option_number(name, value) > 0:
        raise ValueError(f"option {name}={value}: use a number above 0")
    return option_number(name, value)


def strict_json(text: str) -> Any:
    """Return the value of a JSON text. Python also reads NaN and Infinity, which are not JSON and raise a ValueError
    here."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def one_spaced(text: str) -> str:
    """Return a text with one space for each stretch of white space, and none around it."""
    return " ".join(text.split())
