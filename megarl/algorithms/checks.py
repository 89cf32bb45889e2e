"""Checks shared by the algorithms, which raise for unknown options and numbers out of range."""

from collections.abc import Sequence

from megarl.errors import ConfigError


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{key}={value!r} is not a valid choice: use one of {', '.join(choices)}",
            key=key,
            value=value,
            offers={key: choices},
        )


def check_range(key: str, value: float, holds: bool, remedy: str) -> None:
    """Raise a ConfigError with `remedy` unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}={value!r} is out of range: {remedy}", key=key, value=value)
