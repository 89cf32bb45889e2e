"""Writes the page of run folders to a file, without losing a file that is no report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarl.disk import UnreadableError, exists, is_dir, is_file, parse_object, read_text, write_atomically
from megarl.errors import ConfigError
from megarl.report.data import RunData, read_run
from megarl.report.finding import Finding
from megarl.report.findings import FILE as FINDINGS_FILE
from megarl.report.findings import find, from_plain
from megarl.report.page import GENERATOR, page

FILE = "report.html"
"""Name of the report in a run folder."""
_MARK = f'<meta name="generator" content="{GENERATOR}'


def write_report(folders: Sequence[Path], out: Path, key: str = "out") -> None:
    """Write the page of one run, or of several that it compares. An earlier report is replaced.

    Args:
        folders: folders of runs.
        out: the file to write.
        key: name of what `out` comes from, for messages.
    """
    refuse_foreign(out, key)
    runs: list[RunData] = [read_run(folder) for folder in folders]
    text = page(runs, [findings_of(run) for run in runs])
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


def refuse_foreign(out: Path, key: str = "out") -> None:
    """Raise `ConfigError` if a path exists that is no report of megarl."""
    if not exists(out):
        return
    if is_dir(out):
        raise ConfigError(
            f"{key}={out} is a folder: name a file, such as {out / FILE}", key=key, value=str(out), where=out
        )
    if not is_report(out):
        raise ConfigError(
            f"{key}={out} exists and is no report of megarl: name another file, or remove it",
            key=key,
            value=str(out),
            where=out,
        )


def is_report(path: Path) -> bool:
    """Return whether a file is a report that megarl wrote."""
    if not is_file(path):
        return False
    try:
        return _MARK in read_text(path)[:1000]
    except UnreadableError:
        return False
