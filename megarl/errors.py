"""Errors that users can cause or need to see: each names the key, the value and the remedy.

Entry points turn them into one line and an exit code; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on

LARGEST = 10_000
"""Maximum bytes of a value that is sent with an error to other processes."""
LONGEST = 3_000
"""Maximum characters of a message. The middle of a longer one, which repeats a long value, is omitted."""


_E = TypeVar("_E", bound="MegarlError")


class MegarlError(Exception):
    """Base of every error that is reported as one clear line, whatever values the message repeats.

    The line is for people. Programs and tests read the attributes, so the wording of a line can change.

    Attributes:
        key: name of what is wrong: a configuration key ("trainer.devices"), an option, an environment variable, a key
            of a record, or the name of a tensor or metric.
        value: the value that `key` has, or None where it has none or is missing.
        where: the file, folder, record, checkpoint or tensor that holds it.
        offers: values that would work, for each key that could be changed.
    """

    exit_code = 2
    said = False  # whether this process or the first one has printed the line

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        value: Any = None,
        where: str | PathLike[str] | None = None,
        offers: Mapping[str, Iterable[Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.key, self.value = key, value
        self.where = None if where is None else fspath(where)
        self.offers = {name: list(values) for name, values in (offers or {}).items()}

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        half = LONGEST // 2
        return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"

    def within(self, where: str | PathLike[str]) -> Self:
        """Return this error with its location in front of the line: raise the result. `where` then lists locations
        from the outermost to the innermost."""
        outer: Self = _restore(type(self), (f"{fspath(where)}: {self}",), self.__dict__)
        outer.where = fspath(where) if self.where is None else f"{fspath(where)}: {self.where}"
        return outer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its attributes; a value that cannot be pickled is replaced by its text."""
        return _restore, (type(self), self.args, {**self.__dict__, "value": _portable(self.value)})


def _portable(value: Any) -> Any:
    try:
        small = len(pickle.dumps(value)) <= LARGEST
    except Exception:
        small = False
    return value if small else repr(value)[:200]


def _restore(kind: type[_E], args: tuple[Any, ...], attributes: dict[str, Any]) -> _E:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


def first_line(exception: BaseException, *, kind: bool = False) -> str:
    """Return the first line of an exception's message, after its type if `kind`; the type alone if it is empty."""
    name, lines = type(exception).__name__, str(exception).strip().splitlines()
    if not lines:
        return name
    return f"{name}: {lines[0]}" if kind else lines[0]


def one_line(exception: BaseException) -> str:
    """Return an exception's type and whole message as one line."""
    return " ".join(f"{type(exception).__name__}: {exception}".split()).removesuffix(":")


class ConfigError(MegarlError):
    """A configuration key or a combination of keys that is not valid."""


class DataError(MegarlError):
    """A file or a record that cannot be used; the message names the file and the record."""


class CheckpointError(MegarlError):
    """A checkpoint that is incomplete, of another model, or that could not be written."""


class RewardError(MegarlError):
    """A reward function that failed: it raised, timed out, exited, or did not return a valid score."""


class NothingToLearnError(RewardError):
    """A phase whose scores give no signal to learn from. The weights before it are good, and are saved."""


class UnavailableError(MegarlError):
    """A request that the machine or an installed package does not support."""


class NumericsError(MegarlError):
    """Training produced values that cannot be trained on (NaN, infinity)."""

    exit_code = 3


class FindingError(MegarlError):
    """A finding about the run that `health.stop_on` names."""

    exit_code = 3


class InvariantError(NumericsError):
    """An invariant was violated; the message names it."""
