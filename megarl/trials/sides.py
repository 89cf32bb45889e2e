"""The two sides of a comparison: a configuration, or a git revision in a temporary worktree."""

from __future__ import annotations

import difflib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megarl.config.own_keys import read_mapping, words_of
from megarl.config.preset_files import preset_files
from megarl.disk import shown
from megarl.errors import ConfigError


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: as it was written.
        words: settings that it adds to those of both.
        revision: the commit whose code runs; None: the code that runs now.
        environment: variables that make its runs use that code.
    """

    name: str
    words: tuple[str, ...] = ()
    revision: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def read_side(text: str) -> Side:
    """Return what a word stands for: settings, a YAML file, a preset, `.` for the present code, or a git revision."""
    if "=" in text:
        try:
            return Side(text, tuple(shlex.split(text)))
        except ValueError as problem:
            raise ConfigError(f"'{shown(text)}' cannot be split into settings ({problem})", key=shown(text)) from None
    if text == ".":
        return Side(text)
    if text.endswith((".yaml", ".yml")):
        return Side(text, tuple(words_of(read_mapping(text, text))))
    presets, commit = preset_files(Path.cwd() / "conf"), _commit(text)
    if text in presets and commit is not None:
        raise ConfigError(
            f"'{text}' is a preset and a git revision: write +conf={text} or {commit[:12]}",
            key=text,
            offers={text: [f"+conf={text}", commit[:12]]},
        )
    if text in presets:
        return Side(text, (f"+conf={text}",))
    if commit is not None:
        return Side(text, revision=commit)
    near = difflib.get_close_matches(text, presets, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"'{shown(text)}' is neither a preset nor a git revision here: {meant}Compare settings ('optim.lr=1e-3 "
        "optim.eps=1e-6'), YAML files, presets, or revisions; . is the code as it is",
        key=shown(text),
        offers={shown(text): near} if near else None,
    )


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    except OSError:
        return subprocess.CompletedProcess(words, 1, "", "git is not installed")


def _commit(text: str) -> str | None:
    """Return the commit that a revision names; None if it names none."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    return found.stdout.strip() if found.returncode == 0 else None


@contextmanager
def checked_out(sides: Sequence[Side]) -> Iterator[list[Side]]:
    """Yield the sides with the code of their revisions in temporary worktrees, which are removed afterwards."""
    with ExitStack() as stack:
        yield [side if side.revision is None else stack.enter_context(_worktree(side)) for side in sides]


@contextmanager
def _worktree(side: Side) -> Iterator[Side]:
    if _git("cat-file", "-e", f"{side.revision}:megarl/__init__.py").returncode:
        raise ConfigError(
            f"revision '{side.name}' has no megarl/ at its root: compare revisions in a clone of megarl", key=side.name
        )
    if sys.version_info < (3, 11) and (Path.cwd() / "megarl").is_dir():
        raise ConfigError(
            "Python 3.10 would import megarl from this folder: run megarl compare from another one, or use Python 3.11",
            key=side.name,
        )
    with tempfile.TemporaryDirectory(prefix="megarl-compare-") as folder:
        tree = Path(folder, "tree")
        made = _git("worktree", "add", "--detach", "--quiet", str(tree), str(side.revision))
        if made.returncode:
            said = " ".join(made.stderr.split())
            raise ConfigError(f"revision '{side.name}' cannot be checked out ({said})", key=side.name)
        try:
            paths = [str(tree), os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
            # Without the second variable, Python would look in the present folder first.
            own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
            yield replace(side, environment=own)
        finally:
            _git("worktree", "remove", "--force", str(tree))
