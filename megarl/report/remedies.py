"""What to try against a finding: of several remedies, those that the run's settings allow and do not have yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megarl.report.data import RunData

SEPARATOR = "; "
_SETTING = re.compile(r"\b(?P<key>[a-z_]+(?:\.[a-z_]+)+)(?:=(?P<value>[^\s,)]+))?")
_FILES = ("jsonl",)
_PLAIN = {"null": None, "true": True, "false": False}


def remedies(data: RunData, *texts: str) -> str:
    """Return remedies as one text, the most promising first.

    A remedy is left out if it names a key that the run's algorithm does not have, or a value (`key=value`) that the run
    was made with. If none is left, or the run's settings are not known, all are returned.
    """
    fitting = [text for text in texts if all(_helps(data, match) for match in _SETTING.finditer(text))]
    text = SEPARATOR.join(fitting or texts)
    return text if _SETTING.match(text) else text[:1].upper() + text[1:]


def at_most(data: RunData, key: str, value: float) -> tuple[str, ...]:
    """Return the setting of a limit as a remedy; nothing where the run has a limit that is as small."""
    present = data.number(key)
    return () if present is not None and present <= value else (f"{key}={value:g}",)


def first_remedies(text: str, count: int = 2) -> str:
    """Return the first of the remedies in a text."""
    return SEPARATOR.join(text.split(SEPARATOR)[:count])


def _helps(data: RunData, match: re.Match[str]) -> bool:
    key, value = match["key"], match["value"]
    section, name = key.split(".")[:2]
    if name in _FILES or not data.config:
        return True
    there = data.config.get(section)
    if not isinstance(there, Mapping) or name not in there:
        return False
    return value is None or not _same(data.setting(key), value)


def _same(present: Any, value: str) -> bool:
    """Return whether a setting has a value as it is written on a command line; {} is an optional section that is on."""
    if value == "{}":
        return isinstance(present, Mapping)
    if value in _PLAIN:
        return present is _PLAIN[value]
    try:
        return float(present) == float(value)
    except (TypeError, ValueError, OverflowError):
        return str(present) == value
