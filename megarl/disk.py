"""Read and check files and values from users, so that every problem with them can be reported in one line.

It handles impossible paths, unreadable files, JSON and YAML of any size and depth, and torch's pickles.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from megarl.errors import ConfigError, first_line

DEEPEST = 200
"""Maximum nesting of JSON. Python's own limit would be reached later, wherever a deep value is next visited."""
_LONGEST_YAML = 1_000_000
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
_MOST_YAML = 100_000  # maximum values in a YAML file with its aliases expanded
_NAME_BYTES = 255  # maximum length of one component of a path on common file systems


class UnreadableError(ValueError):
    """Content that cannot be used. The message continues a sentence that starts with the name of the file."""


# --- paths ------------------------------------------------------------------------------------------------------------


def local(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` expanded; the home of a user that does not exist stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def exists(path: Path) -> bool:
    """Return whether a path exists. A path that the file system cannot look up does not exist."""
    return why_missing(path) is None


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False for paths that the file system cannot look up."""
    return exists(path) and path.is_file()


def is_dir(path: Path) -> bool:
    """Return whether a path is a folder; False for paths that the file system cannot look up."""
    return exists(path) and path.is_dir()


def why_missing(path: Path) -> str | None:
    """Return in a few words why a path does not exist; None if it exists."""
    try:
        path.stat()
    except (OSError, ValueError) as problem:  # ValueError: a zero byte
        return _reason(problem)
    return None


def why_no_name(path: Path) -> str | None:
    """Return why a path can never be written; None if its name is valid."""
    if "\0" in str(path):
        return "a path cannot hold a zero byte"
    try:
        long = any(len(os.fsencode(part)) > _NAME_BYTES for part in path.parts)
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return f"the name of a file or folder is at most {_NAME_BYTES} bytes long" if long else None


def writable(path: str, key: str) -> Path:
    """Return the absolute path of a key's value for writing; raise `ConfigError` if it cannot be written."""
    place = local(path).absolute()
    problem, there = why_no_name(place), None
    if not problem:
        there = next(folder for folder in (place, *place.parents) if exists(folder))
        if not is_dir(there):
            problem = f"{there} is a file"
        elif not os.access(there, os.W_OK):
            problem = f"{there} is read-only"
    if problem:
        raise ConfigError(
            f"{key}={shown(path)} cannot be written: {problem}; choose another path", key=key, value=path, where=there
        )
    return place


def require_new(path: str, key: str) -> None:
    """Raise `ConfigError` if the path of a key's value exists, for files that are not overwritten."""
    if exists(local(path)):
        raise ConfigError(
            f"{key}={path} exists and would be overwritten: remove it, or name another file", key=key, value=path
        )


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file, from text in one or several pieces or from bytes. A reader never sees, and a crash never leaves,
    half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                file.writelines(part.encode() for part in ([content] if isinstance(content, str) else content))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, and rename it to `folder` when the block ends without an error.

    For one process; several processes that write together use `temp_sibling`.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file during the block; other processes of this machine wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def temp_sibling(path: Path) -> Path:
    """Return the temporary path of a file or folder that is written and then renamed to `path`.

    It is the same in every process of a run.
    """
    return path.with_name(f".{path.name}.writing")


# --- content ----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Read a UTF-8 file; raise `UnreadableError` with the reason if that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise UnreadableError(f"is not UTF-8 ({problem.reason} at byte {problem.start})") from None
    except (OSError, ValueError) as problem:
        raise UnreadableError(f"cannot be read ({_reason(problem)})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; raise `UnreadableError` with the reason if that fails."""
    return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Numbers of thousands of digits and unlimited nesting are rejected."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text)
    except RecursionError:
        raise UnreadableError(_too_deep("JSON")) from None
    except UnicodeDecodeError as problem:
        raise UnreadableError(f"is not UTF-8 ({problem.reason} at byte {problem.start})") from None
    except ValueError as problem:  # JSONDecodeError, or a plain ValueError for an integer of too many digits
        raise UnreadableError(f"is not valid JSON ({str(problem).partition(';')[0]})") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise UnreadableError(_too_deep("JSON"))
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON text that must contain an object."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise UnreadableError(f"holds a {type(value).__name__} instead of a JSON object")
    return value


def nan_to_null(content: Any) -> Any:
    """Return content for JSON with null for the numbers that it cannot hold: NaN and infinity."""
    if isinstance(content, dict):
        return {key: nan_to_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [nan_to_null(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def check_yaml(text: str) -> None:
    """Raise for YAML with recursive aliases, unlimited nesting, or aliases that expand to very many values."""
    if len(text) > _LONGEST_YAML:
        raise UnreadableError(f"is YAML of more than {_LONGEST_YAML:,} characters")
    opened = list(accumulate(_BRACKETS.get(sign, 0) for sign in text))
    if max(opened, default=0) > DEEPEST:  # the parser would take minutes to fail
        raise UnreadableError(_too_deep("YAML"))
    if "&" not in text:
        return
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _expanded(root, {}, set())
    except RecursionError:
        raise UnreadableError(_too_deep("YAML")) from None
    except yaml.YAMLError as problem:
        raise UnreadableError(f"is not valid YAML ({' '.join(str(problem).split())})") from None


def load_plain(file: Any, **options: Any) -> Any:
    """Load a `torch.save` file that contains only tensors and plain values. Nothing in it is executed."""
    import torch  # takes seconds, and most users of this module do not need it

    try:
        return torch.load(file, weights_only=True, **options)
    except Exception as problem:  # a broken or hostile pickle may raise anything
        said = str(problem)
        if re.search(r"unsupported (global|class|operand)", said, re.IGNORECASE):
            damaged = ", or is damaged" if "operand" in said else ""  # a newer pickle protocol, or not a pickle
            raise UnreadableError(f"holds more than weights and plain values{damaged}; it is not loaded") from None
        detail = re.search(r"WeightsUnpickler error: ([^\n]*)", said)
        first = detail[1] if detail else first_line(problem)
        raise UnreadableError(f"is damaged, or not a torch.save file ({first[:160].strip()})") from None


def shown(value: object, most: int = 120) -> str:
    """Return a value for a message, shortened to a readable length."""
    text = str(value)
    start = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[:most])
    return start if len(text) <= most else f"{start}... ({len(text)} characters)"


def _reason(problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError):
        return "no such file or folder"
    return (isinstance(problem, OSError) and problem.strerror) or str(problem)


def _too_deep(kind: str) -> str:
    return f"is {kind} that is nested too deep (more than {DEEPEST} levels)"


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if deepest > DEEPEST:
            break
    return deepest


def _expanded(node: yaml.Node, known: dict[int, int], inside: set[int]) -> int:
    """Return the number of values in a node with its aliases expanded."""
    name = id(node)
    if name in inside:
        raise UnreadableError("has an alias that refers to itself")
    if name not in known:
        children: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [one for child in children for one in (child if isinstance(child, tuple) else (child,))]
        known[name] = 1 + sum(_expanded(one, known, inside | {name}) for one in inner)
        if known[name] > _MOST_YAML:
            raise UnreadableError(f"has aliases that expand to more than {_MOST_YAML:,} values")
    return known[name]
