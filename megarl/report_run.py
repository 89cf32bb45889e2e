"""`megarl report RUN [RUN ...] [out=FILE]`: one page that says how a run went, or compares several."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megarl.disk import exists, local, shown
from megarl.errors import ConfigError
from megarl.report.folders import refusal, run_folder

USAGE = "megarl report [--compare] RUN [RUN ...] [out=FILE]"
_COMPARE = "--compare"  # says what several runs say anyway


def run(argv: Sequence[str]) -> int:
    """Write the page that a command line asks for and print its path. Return the exit code."""
    names, out = arguments(argv)
    folders = [run_folder(name, "report") for name in names]
    _refuse_repeated(names, folders)
    from megarl.report.shell import REPORT
    from megarl.report.write import FILE, page_path, write_report

    default = folders[0] / FILE if len(folders) == 1 else Path(FILE)
    path = page_path(out if out is not None else str(default), "out", REPORT)
    write_report(folders, path)
    sys.stdout.write(f"{shown(path, 1000)}\n")
    return 0


def arguments(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the runs that a command line names, and the value of `out`."""
    runs, out = [], None
    for word in argv:
        key, equals, value = word.partition("=")
        if word == _COMPARE:
            continue
        if word.startswith("-"):
            raise ConfigError(
                f"megarl report has no option '{shown(word)}': write {USAGE}", key=shown(key), value=value or None
            )
        if equals and key == "out":
            if not value:
                raise ConfigError("out= is empty: name a file, as in out=report.html", key="out", value="")
            out = value
        elif equals and not exists(local(word)):
            near = difflib.get_close_matches(key.lower(), ["out", "run"], n=1, cutoff=0.3)
            meant = f"write {shown(value)} alone" if near == ["run"] else "its one setting is out=FILE"
            raise ConfigError(
                f"{shown(key)}= is no setting of megarl report: {meant}; {USAGE}",
                key=shown(key),
                value=value,
                offers={shown(key): ["out"]},
            )
        else:
            runs.append(word)
    if not runs:
        raise ConfigError(f"megarl report needs the folder of a run, as in megarl report runs/demo; {USAGE}", key="RUN")
    if _COMPARE in argv and len(runs) == 1:
        raise ConfigError(
            f"--compare needs two runs or more: write megarl report --compare {shlex.quote(shown(runs[0]))} OTHER_RUN, "
            "or leave --compare out for the page of one run",
            key=_COMPARE,
            value=runs[0],
        )
    return runs, out


def _refuse_repeated(names: Sequence[str], folders: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for name, folder in zip(names, folders, strict=True):
        if folder.resolve() in seen:
            raise refusal(name, "is named twice: name each run once")
        seen.add(folder.resolve())
