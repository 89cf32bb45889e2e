"""Writes pages to files, without losing a file that is no page of the same command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarl.disk import (
    UnreadableError,
    exists,
    is_dir,
    is_file,
    local,
    parse_object,
    read_text,
    shown,
    why_no_name,
    writable,
    write_atomically,
)
from megarl.errors import ConfigError
from megarl.report.data import RunData, read_run
from megarl.report.finding import Finding
from megarl.report.findings import FILE as FINDINGS_FILE
from megarl.report.findings import find, from_plain
from megarl.report.shell import REPORT, mark

FILE = "report.html"
"""Name of the report in a run folder."""


def write_report(folders: Sequence[Path], out: Path, key: str = "out") -> None:
    """Write the page of one run, or of several that it compares. An earlier report is replaced.

    Args:
        folders: folders of runs.
        out: the file to write.
        key: name of what `out` comes from, for messages.
    """
    from megarl.report.page import page  # not for other pages, nor to refuse a file

    refuse_foreign(out, key)
    runs: list[RunData] = [read_run(folder) for folder in folders]
    write_page(page(runs, [findings_of(run) for run in runs]), out, key)


def page_path(name: str, key: str, command: str) -> Path:
    """Return the absolute path of the file that a key names for a page; refuse what must not or cannot be written.

    Args:
        name: the value of the key.
        key: name of the key.
        command: the command that writes the page.
    """
    if not name:
        raise ConfigError(f"{key}= is empty: name a file, as in {key}={_example(command)}", key=key, value="")
    path = local(name)
    if problem := why_no_name(path):
        raise ConfigError(f"{key}={shown(path)} cannot be written: {problem}", key=key, value=name)
    path = writable(str(path.parent), key) / path.name
    refuse_foreign(path, key, command)
    return path


def write_page(text: str, out: Path, key: str, command: str = REPORT) -> None:
    """Write a command's page to a file; an earlier page of the command is replaced, nothing else."""
    refuse_foreign(out, key, command)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    except OSError as problem:
        raise ConfigError(
            f"{key}={out} cannot be written ({problem.strerror or problem}): name a file in another folder",
            key=key,
            value=str(out),
            where=out,
        ) from None


def findings_of(run: RunData) -> list[Finding]:
    """Return the findings that a run wrote at its end, or those of its metrics if it goes on or was continued."""
    try:
        stored = parse_object(read_text(run.path / FINDINGS_FILE))
        if run.rows and stored["steps"] == int(run.rows[-1]["step"]):
            return [from_plain(finding) for finding in stored["findings"]]
    except (UnreadableError, LookupError, TypeError, ValueError):  # there is none, or it was changed
        pass
    return find(run)


def refuse_foreign(out: Path, key: str = "out", command: str = REPORT) -> None:
    """Raise `ConfigError` if a path exists that is no page of a command."""
    if not exists(out):
        return
    if is_dir(out):
        raise ConfigError(
            f"{key}={out} is a folder: name a file, such as {out / _example(command)}",
            key=key,
            value=str(out),
            where=out,
        )
    if not is_report(out, command):
        what = "report of megarl" if command == REPORT else f"page of {command}"
        raise ConfigError(
            f"{key}={out} exists and is no {what}: name another file, or remove it",
            key=key,
            value=str(out),
            where=out,
        )


def is_report(path: Path, command: str = REPORT) -> bool:
    """Return whether a file is a page that a command of megarl wrote."""
    if not is_file(path):
        return False
    try:
        return mark(command) in read_text(path)[:1000]
    except UnreadableError:
        return False


def _example(command: str) -> str:
    """Return a name for a page of a command."""
    return f"{command.removeprefix('megarl ')}.html"
