"""Refusals shared by the algorithms: an option that does not exist, or a number that cannot work."""

from collections.abc import Sequence

from megarl.errors import ConfigError


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{key}={value!r} is not known: use one of {', '.join(choices)}",
            key=key,
            value=value,
            offers={key: choices},
        )


def check_range(key: str, value: float, holds: bool, remedy: str) -> None:
    """Raise a ConfigError that says `remedy` unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}={value!r} cannot work: {remedy}", key=key, value=value)
