"""`megarl new FOLDER`: writes a project of the user's own, a copy of the files in `megarl/project/`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megarl.disk import exists, is_dir, shown, writable
from megarl.errors import ConfigError

PROJECT = Path(__file__).resolve().parent / "project"
"""The files of a new project. @NAME@ in them becomes the name of the folder."""
PYTHON_FILE = ".megarl-python"
"""File of a project with the path of the interpreter that its Makefile and launcher use."""
_OTHER_NAMES = {"gitignore": ".gitignore"}  # as .gitignore, it would apply to this folder


def run(argv: Sequence[str]) -> int:
    """Write a project and print what can be done with it. Return the exit code."""
    folder = _folder(argv)
    write_project(folder, argv[0])
    enter = "" if folder.resolve() == Path.cwd() else f"cd {shown(shlex.quote(argv[0]))} && "
    sys.stdout.write(
        f"{shown(argv[0])} has a preset, a reward function with a test, prompts, a SLURM launcher and a README:\n"
        f"  {enter}make test    # tests the reward function; checks the preset and the launcher\n"
        f"  {enter}make demo    # trains for half a minute on a CPU\n"
    )
    return 0


def project_files() -> dict[str, Path]:
    """Return the files of a new project by their paths in it, each with its template."""
    found = {}
    for path in sorted(PROJECT.rglob("*")):
        inside = path.relative_to(PROJECT)
        if path.is_file() and "__pycache__" not in inside.parts:  # an installation compiles the Python files
            found[_OTHER_NAMES.get(inside.as_posix(), inside.as_posix())] = path
    return found


def write_project(folder: Path, given: str) -> None:
    """Write a project into a folder that is missing or empty.

    Args:
        folder: absolute path.
        given: the folder as the user wrote it, for messages.
    """
    name = " ".join(folder.name.split()) or "A project"
    texts = {
        inside: template.read_text(encoding="utf-8").replace("@NAME@", name)
        for inside, template in project_files().items()
    }
    texts[PYTHON_FILE] = f"{sys.executable}\n"
    made = not exists(folder)
    written: list[Path] = []
    try:
        for inside, text in texts.items():
            path = folder / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(path)
            path.write_text(text, encoding="utf-8")
            if path.suffix == ".sh":
                path.chmod(path.stat().st_mode | 0o111)
    except OSError as problem:
        for path in written:  # so that the same command can be tried again
            with contextlib.suppress(OSError):
                path.unlink()
        for path in [path.parent for path in written if path.parent != folder or made]:
            with contextlib.suppress(OSError):  # not yet empty, or removed already
                path.rmdir()
        raise ConfigError(
            f"FOLDER={shown(given)} cannot be written: {problem.strerror or problem}; choose another path",
            key="FOLDER",
            value=given,
            where=folder,
        ) from None


def _folder(argv: Sequence[str]) -> Path:
    """Return the absolute path of the folder that a command line names; refuse one that cannot become a project."""
    if len(argv) != 1 or not argv[0].strip() or argv[0].startswith("-") or "=" in argv[0]:
        plain = len(argv) > 1 and not any(word.startswith("-") or "=" in word for word in argv)
        quoted = f"megarl new {shlex.quote(' '.join(argv))}" if plain else "megarl new my-project"
        raise ConfigError(
            f"megarl new takes one FOLDER and nothing else: write {quoted}",
            key="FOLDER",
            value=" ".join(argv) or None,
        )
    folder = writable(argv[0], "FOLDER")
    if exists(folder):
        try:
            full = is_dir(folder) and any(os.scandir(folder))
        except OSError:
            full = False  # writing says why
        if full:
            raise ConfigError(
                f"FOLDER={shown(argv[0])} is not empty: choose a name that is not used yet, or an empty folder",
                key="FOLDER",
                value=argv[0],
                where=folder,
            )
    return folder
