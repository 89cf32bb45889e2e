"""What `megarl ls` and `megarl show` print: presets, algorithms, reward functions and families, one line each.

Sources are read, not imported: importing the families takes seconds, and every list should appear at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from megarl.config.algorithms import ALGORITHMS, Algorithm
from megarl.config.help import presets
from megarl.config.leaf import leaves, optional_sections
from megarl.config.preset_files import preset_files, unknown_preset
from megarl.disk import UnreadableError, check_yaml, read_text
from megarl.errors import ConfigError
from megarl.functions import extensions

_PACKAGE = Path(__file__).resolve().parent
_REWARDS = ("builtin", "verifiable", "classifier")
_WIDTH = 110


def algorithms() -> Iterator[tuple[str, str]]:
    """Yield the algorithms, each with what it does, and those that installed packages announce."""
    for name, algorithm in ALGORITHMS.items():
        yield name, algorithm.about
    yield from _installed(extensions.ALGORITHMS, "megarl train")


def rewards() -> Iterator[tuple[str, str]]:
    """Yield the ready-made reward functions, as values of `reward.fn`, each with the start of its docstring."""
    for file in _REWARDS:
        for node in _parsed(_PACKAGE / "rewards" / f"{file}.py").body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if "outputs" in [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]:
                yield f"megarl.rewards.{file}:{node.name}", _first_sentence(ast.get_docstring(node))


def families() -> Iterator[tuple[str, str]]:
    """Yield the families of models that megarl reads and writes, each with the start of its file's docstring."""
    for path in sorted((_PACKAGE / "models" / "exchange" / "families").glob("[!_]*.py")):
        yield path.stem, _first_sentence(ast.get_docstring(_parsed(path)))
    yield from _installed(extensions.FAMILIES)


def _installed(group: str, command: str = "") -> Iterator[tuple[str, str]]:
    """Yield what installed packages announce, each with the package that does, without importing it."""
    for name, point in extensions.announced(group).items():
        used = f" ({command} {name})" if command else ""
        yield name, f"{point.value} of {extensions.package_of(point)}{used}"


def _presets() -> Iterator[tuple[str, str]]:
    yield from presets(Path.cwd() / "conf")


KINDS = {"algorithms": algorithms, "presets": _presets, "rewards": rewards, "families": families}
_USE = {
    "algorithms": "megarl ALGORITHM KEY=VALUE ...",
    "presets": "megarl ALGORITHM +conf=PRESET; megarl show PRESET",
    "rewards": "reward.fn=NAME; its options: docs/rewards.md",
    "families": "model.path=FOLDER; docs/models.md",
}


def listed(kind: str) -> str:
    """Return one list as text: a heading that says how to use an entry, and a line for each entry."""
    entries = list(KINDS[kind]())
    column = max(len(name) for name, _ in entries)
    lines = [f"{kind} ({_USE[kind]}):", *(f"  {name:<{column}}  {_short(about, column)}" for name, about in entries)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _short(about: str, column: int) -> str:
    room = max(40, _WIDTH - column - 4)
    return about if len(about) <= room else f"{about[: room - 4].rsplit(' ', 1)[0]} ..."


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def _first_sentence(doc: str | None) -> str:
    paragraph = " ".join((doc or "").split("\n\n")[0].split())
    return re.split(r"\. |\.$", paragraph, maxsplit=1)[0]


def shown_preset(name: str) -> str:
    """Return a preset's YAML as it is, and after it, as comments, its file and what it composes with."""
    folder = Path.cwd() / "conf"
    files = preset_files(folder)
    if name not in files:
        raise unknown_preset(name, list(files), folder)
    try:
        text = read_text(files[name])
        check_yaml(text)
        plain = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnreadableError) as error:
        raise ConfigError(
            f"preset '{name}' cannot be read ({files[name]}): {' '.join(str(error).split())}",
            key="preset",
            value=name,
            where=files[name],
        ) from None
    lines = [text.rstrip("\n"), "", f"# file: {files[name]}"]
    others = [str(each) for each in plain.get("defaults", []) if each != "_self_"] if isinstance(plain, dict) else []
    if others:
        lines.append(f"# composes on: {', '.join(others)}")
    using = [algorithm for algorithm in ALGORITHMS.values() if _suits(algorithm, plain)]
    for algorithm in using:
        groups = " ".join(f"{group}={option}" for group, option in algorithm.groups.items())
        lines.append(f"# megarl {algorithm.command} +conf={name}    on its defaults and {groups}")
    if not using:
        lines.append(f"# megarl ALGORITHM +conf={name}    keys that the algorithm does not have are left out")
    return "\n".join(lines) + "\n"


def _suits(algorithm: Algorithm, plain: object) -> bool:
    """Return whether an algorithm has all of a preset's keys. Others drop the keys that they do not have."""
    known = {leaf.key for leaf in leaves(algorithm.config)}
    known |= {section.key for section in optional_sections(algorithm.config)}
    return all(any(f"{key}.".startswith(f"{each}.") for each in known) for key in _keys(plain))


def _keys(plain: object, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a preset, without its list of other presets."""
    if not isinstance(plain, dict) or not plain:
        yield prefix.rstrip(".")
        return
    for name, below in plain.items():
        if prefix or name != "defaults":
            yield from _keys(below, f"{prefix}{name}.")
