"""Finds the folder of a run that a user names, and says what to name instead of anything else."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path

from megarl.disk import exists, is_dir, is_file, local, shown
from megarl.errors import ConfigError
from megarl.report.data import METRICS


def run_folder(name: str, command: str, *, several: bool = True, unlogged: bool = False) -> Path:
    """Return the folder of a run; refuse anything else with what to name instead.

    Args:
        name: what the user typed.
        command: word of the command, for examples.
        several: whether the command takes several runs, for examples.
        unlogged: whether a run that has logged nothing yet is taken, too.
    """
    path = local(name)
    if not exists(path):
        raise refusal(name, f"is no folder: {_runs_beside(path)}")
    if is_file(path):
        parent = path.parent
        near = f"name its folder, {parent}" if is_file(parent / METRICS) else "name the folder of a run"
        raise refusal(name, f"is a file: {near}")
    started = is_file(path / "config.yaml") and is_file(path / "versions.json")
    if is_file(path / METRICS) or (unlogged and started):
        return path
    above = next((one for one in path.absolute().parents if is_file(one / METRICS)), None)
    if above is not None:
        kind = "a checkpoint" if path.absolute().parent.name == "checkpoints" else "a folder"
        raise refusal(name, f"is {kind} of a run: name the run, {_short(above)}")
    if started:
        raise refusal(name, "is a run without metrics.csv: wait for its first metrics; it needs logger.csv=true")
    inside = sorted(file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{METRICS}"))
    if inside:
        few = " ".join(shlex.quote(str(one)) for one in inside[: 3 if several else 1])
        count = f"{len(inside)} run{'s' * (len(inside) > 1)}"
        which = "them" if several else "one"
        raise refusal(name, f"holds {count} and is none: name {which}, as in megarl {command} {few}")
    raise refusal(name, "is no run: it has no metrics.csv; name a folder that a training run has written")


def _runs_beside(path: Path) -> str:
    """Return which run a path that does not exist may have meant."""
    folder = path.parent if is_dir(path.parent) else Path("runs")
    names = [file.parent.name for file in folder.glob(f"*/{METRICS}")] if is_dir(folder) else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "name the folder of a run, such as runs/NAME, which training prints at its end"


def refusal(name: str, problem: str) -> ConfigError:
    """Return the error about a run that a user named. `problem` continues the sentence."""
    return ConfigError(f"RUN={shown(name)} {problem}", key="RUN", value=name, where=local(name))


def _short(path: Path) -> Path:
    """Return a path from the current folder where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
