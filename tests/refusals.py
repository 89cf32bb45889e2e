"""What a refused input must show: the error's type, key, value and offers, and one line that names them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from megarl.config.compose import run
from megarl.errors import ConfigError, MegarlError

_ANY: Any = object()


class Refused:
    """The error that `refused` caught, once its block has ended."""

    error: MegarlError

    @property
    def line(self) -> str:
        return str(self.error)


@contextmanager
def refused(
    kind: type[MegarlError] = ConfigError,
    *,
    key: str | None = None,
    value: Any = _ANY,
    where: str | None = None,
    offers: Mapping[str, list[Any]] = _ANY,
    names: tuple[str, ...] = (),
) -> Iterator[Refused]:
    """Assert that the block raises one error with this data, and that its line names it.

    Args:
        key: the error's `key`. The line must contain it.
        where: the end of the error's `where`, as folders of tests have long names. The line must contain it.
        names: other identifiers that the line must contain: keys, file names, tensors. No prose.
    """
    found = Refused()
    with pytest.raises(kind) as caught:
        yield found
    found.error = error = caught.value
    assert_refusal(error, key=key, value=value, where=where, offers=offers, names=names)


def assert_refusal(
    error: MegarlError,
    *,
    key: str | None = None,
    value: Any = _ANY,
    where: str | None = None,
    offers: Mapping[str, list[Any]] = _ANY,
    names: tuple[str, ...] = (),
) -> None:
    """Check an error's data and that its line names them; see `refused`."""
    line = str(error)
    assert "\n" not in line
    if key is not None:
        assert error.key == key, line
    if value is not _ANY:
        assert error.value == value, line
    if where is not None:
        assert error.where is not None, line
        assert error.where.endswith(where), (error.where, line)
    if offers is not _ANY:
        assert error.offers == offers, line
    for name, values in error.offers.items():
        # Of a name in a module or a section, the line may show the name alone.
        texts = [text for value in values for text in (str(value), _written(value))]
        assert any(re.split("[.:]", text)[-1] in line for text in texts), (name, values, line)
    for name in (error.key, where, *error.offers, *names):
        assert name is None or name in line, (name, line)


def assert_command_refused(
    done: subprocess.CompletedProcess[str], *names: str, exit_code: int = 2, told: int = 1
) -> str:
    """Check that a command ended with the exit code and one line on stderr that contains the names; return the line.

    Args:
        names: identifiers such as keys, values, files. No prose.
        told: number of processes that must report it.
    """
    assert done.returncode == exit_code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if "error: " in line and not line.startswith("srun: ")]
    assert len(lines) == told, done.stderr[-2000:]
    for name in names:
        assert name in lines[0], (name, lines[0])
    return lines[0]


def assert_entry_refuses(entry: str, argv: Sequence[str], names: Sequence[str], capsys: Any) -> None:
    """Check that an entry point, called in this process, ends with exit code 2 and one line that names what
    is wrong."""
    with pytest.raises(SystemExit) as ended:
        run(entry, list(argv), lambda config: 0)
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert all(name in error for name in names), error
    assert error.count("\n") == 1, error


def _written(value: Any) -> str:
    """A value as a line offers it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
