"""`megarl report RUN [RUN ...] [out=FILE]`: one page that says how a run went, or compares several."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megarl.disk import exists, is_dir, is_file, local, shown, why_no_name, writable
from megarl.errors import ConfigError

USAGE = "megarl report RUN [RUN ...] [out=FILE]"
_METRICS = "metrics.csv"


def run(argv: Sequence[str]) -> int:
    """Write the page that a command line asks for and print its path. Return the exit code."""
    names, out = arguments(argv)
    folders = [_folder(name) for name in names]
    _refuse_repeated(names, folders)
    from megarl.report.write import FILE, write_report

    default = folders[0] / FILE if len(folders) == 1 else Path(FILE)
    path = local(out) if out is not None else default
    if problem := why_no_name(path):
        raise ConfigError(f"out={shown(path)} cannot be written: {problem}", key="out", value=out)
    path = writable(str(path.parent), "out") / path.name
    write_report(folders, path)
    sys.stdout.write(f"{shown(path, 1000)}\n")
    return 0


def arguments(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the runs that a command line names, and the value of `out`."""
    runs, out = [], None
    for word in argv:
        key, equals, value = word.partition("=")
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
    return runs, out


def _folder(name: str) -> Path:
    """Return the folder of a run; refuse anything else with what to name instead."""
    path = local(name)
    if not exists(path):
        raise _refusal(name, f"is no folder: {_runs_beside(path)}")
    if is_file(path):
        parent = path.parent
        near = f"name its folder, {parent}" if is_file(parent / _METRICS) else "name the folder of a run"
        raise _refusal(name, f"is a file: {near}")
    if is_file(path / _METRICS):
        return path
    above = next((one for one in path.absolute().parents if is_file(one / _METRICS)), None)
    if above is not None:
        kind = "a checkpoint" if path.absolute().parent.name == "checkpoints" else "a folder"
        raise _refusal(name, f"is {kind} of a run: name the run, {_short(above)}")
    if is_file(path / "config.yaml") and is_file(path / "versions.json"):
        raise _refusal(name, "is a run without metrics.csv: wait for its first metrics; it needs logger.csv=true")
    inside = sorted(file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{_METRICS}"))
    if inside:
        few = " ".join(shlex.quote(str(one)) for one in inside[:3])
        raise _refusal(name, f"holds {len(inside)} runs and is none: name them, as in megarl report {few}")
    raise _refusal(name, "is no run: it has no metrics.csv; name a folder that a training run has written")


def _runs_beside(path: Path) -> str:
    """Return which run a path that does not exist may have meant."""
    folder = path.parent if is_dir(path.parent) else Path("runs")
    names = [file.parent.name for file in folder.glob(f"*/{_METRICS}")] if is_dir(folder) else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "name the folder of a run, such as runs/NAME, which training prints at its end"


def _refuse_repeated(names: Sequence[str], folders: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for name, folder in zip(names, folders, strict=True):
        if folder.resolve() in seen:
            raise _refusal(name, "is named twice: name each run once")
        seen.add(folder.resolve())


def _refusal(name: str, problem: str) -> ConfigError:
    return ConfigError(f"RUN={shown(name)} {problem}", key="RUN", value=name, where=local(name))


def _short(path: Path) -> Path:
    """Return a path from the current folder where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
