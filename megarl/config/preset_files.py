"""Presets by name: which there are, which a command line names, and the error for one that does not exist.

Nothing here reads more than a first line, or imports Hydra; `presets.py` composes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from megarl.config.messages import one_of
from megarl.config.resources import conf_folder
from megarl.disk import is_file
from megarl.errors import ConfigError

GROUP = "conf"
HEADER = "# @package _global_"


def preset_files(user_folder: Path) -> dict[str, Path]:
    """Return presets by name. The user's presets replace shipped ones of the same name."""
    return {path.stem: path for folder in (conf_folder(), user_folder) for path in sorted(_presets_in(folder))}


def chosen_presets(argv: list[str]) -> list[str]:
    """Return the names given to `+conf=` or `+conf@SECTION=` on a command line, in order."""
    values = (part.partition("=")[2] for part in argv if part.lstrip("+").startswith((GROUP + "=", GROUP + "@")))
    return [name.strip(" '\"") for value in values for name in value.strip("[] ").split(",") if name.strip()]


def _presets_in(folder: Path) -> Iterator[Path]:
    """Yield the YAML files directly in a folder whose first line marks them as presets."""
    for path in folder.glob("*.yaml"):
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                if lines.readline().strip() == HEADER:
                    yield path
        except OSError:  # a folder with that name, or a file that cannot be opened
            continue


def unknown_preset(name: str, known: list[str], user_folder: Path) -> ConfigError:
    """Return the error for a preset that does not exist, or whose file lacks the first line of a preset."""
    file = user_folder / f"{name}.yaml"
    if is_file(file):
        return ConfigError(
            f"{file} is not a preset: its first line must be '{HEADER}'", key="preset", value=name, where=file
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"did you mean {one_of(near)}? " if near else ""
    return ConfigError(
        f"unknown preset '{name}'; {meant}known presets: {', '.join(sorted(known))} (yours belong in {user_folder})",
        key="preset",
        value=name,
        offers={"preset": near or sorted(known)},
    )
