"""Extensions: objects outside of megarl that a configuration names, or that an installed package announces.

Every process of a run imports the same names. Scoring functions and data sources are loaded where they run; everything
else that a user can add is loaded here: advantages, callbacks, orchestrators, algorithms and families of models.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.errors import ConfigError, MegarlError, first_line
from megarl.functions.named import resolve

ALGORITHMS, FAMILIES = "megarl.algorithms", "megarl.families"
"""Groups of entry points, by which installed packages announce algorithms and families of models."""


def load(key: str, name: str, kind: str = "function") -> Any:
    """Import what a key names. Runs the user's code.

    Args:
        key: the configuration key, or whatever else gives the name.
        name: package.module:NAME or path/to/file.py:NAME.
        kind: what the name stands for, for the messages.

    Raises:
        ConfigError: there is no such name, or its file cannot be imported.
    """
    named = resolve(name, key, kind)
    try:
        return named.value()
    except MegarlError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises anything
        raise failed(key, name, "cannot be imported", error, named.file) from error


def failed(key: str, name: str, what: str, error: BaseException, file: str | None = None) -> ConfigError:
    """Return the error for code of the user that raised one, with the line of the code that did."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1] if frames else None)
    place = "" if frame is None else f" at {frame.filename}:{frame.lineno}"
    return ConfigError(
        f"{key}={name} {what}: {first_line(error, kind=True)}{place}; correct it there, or name another",
        key=key,
        value=name,
        where=place.removeprefix(" at ") or None,
    )


def wrong_kind(key: str, name: str, wanted: str, found: Any, lacks: Sequence[str] = ()) -> ConfigError:
    """Return the error for an object that is not what a key needs.

    Args:
        wanted: what the key needs, as in "a class of Lightning callbacks".
        found: the object.
        lacks: methods or attributes that it would need.
    """
    is_class = isinstance(found, type)
    what = f"the class {found.__name__}" if is_class else f"a {type(found).__name__}"
    said = f" without {' and '.join(lacks)}" if lacks else ""
    return ConfigError(
        f"{key}={name} is {what}{said}, and it must be {wanted}: correct it, or name another", key=key, value=name
    )


def announced(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Return the entry points of a group by name. Refuse a name that two installed packages announce."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=group):
        before = found.setdefault(point.name, point)
        if before.value != point.value:
            raise ConfigError(
                f"two installed packages announce {point.name} in {group}: {before.value} ({package_of(before)}) and "
                f"{point.value} ({package_of(point)}); uninstall one of them",
                key=group,
                value=point.name,
            )
    return found


def package_of(point: importlib.metadata.EntryPoint) -> str:
    """Return the name and version of the package that announces something."""
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def changed(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the keys that name the same extension in both, with other code."""
    same = [key for key in now if key in before and before[key]["name"] == now[key]["name"]]
    return [key for key in same if before[key].get("sha256") != now[key].get("sha256")]


def fingerprints(named: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return name, file and a hash of the file of each extension, by key."""
    found = {}
    for key, name in named.items():
        file = resolve(name, key).file
        described = {"name": name}
        if file is not None:
            described |= {"file": file, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
        found[key] = described
    return found
