"""Checks of the options of toy tasks, which come from `data.options`."""

from __future__ import annotations

from megarl.errors import ConfigError


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """Return an option that must be an integer from `least` to `most`; refuse any other value."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _refused(name, value, f"an integer from {least} to {most}")
    return value


def share(name: str, value: object) -> float:
    """Return an option that must be a number from 0 to 1; refuse any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _refused(name, value, "a number from 0 to 1")
    return float(value)


def _refused(name: str, value: object, wanted: str) -> ConfigError:
    key = f"data.options.{name}"
    return ConfigError(f"{key}={value!r} is not {wanted}: set it to one", key=key, value=value)
