"""The texts of `--help`: a screen, `--help KEY`, and `--help all` with every key, group and preset."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.config.algorithms import entry_point
from megarl.config.leaf import Leaf, OptionalSection, leaves, optional_sections
from megarl.config.messages import unknown_key
from megarl.config.preset_files import GROUP, preset_files
from megarl.config.resources import conf_folder

WIDTH = 80
_INDENTED: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    ", "break_on_hyphens": False}
_BOUNDS = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}


def short_help(entry: str, plain: dict[str, Any]) -> str:
    """Return the text of `--help`, at most a screen of 24 lines of 80 characters: the keys that people change first.

    Args:
        entry: name of an entry point.
        plain: the configuration with the values to show.
    """
    described = entry_point(entry)
    known = {leaf.key: leaf for leaf in leaves(described.config)}
    first = {key: f"{key}={shown(in_force(plain, known[key]))}" for key in described.first_keys if key in known}
    column = min(max(map(len, first.values())), WIDTH // 2)
    command = f"megarl {described.command}"
    more = {
        f"{command} --help KEY": "what a key means, or each key of a section",
        f"{command} --help all": "every key, group, preset and flag",
        "megarl ls presets": "complete setups, each for +conf=PRESET",
    }
    lines = [
        f"usage: {command} [KEY=VALUE ...] [+conf=PRESET]",
        f"   or: python -m megarl.{described.program} [KEY=VALUE ...]",
        "",
        *textwrap.wrap(described.about, WIDTH),
        "",
        f"{len(first)} of its {len(known)} keys, those that people change first, with their values:",
        "",
        *(_cut(f"  {given:<{column}}  {_gist(known[key].doc)}") for key, given in first.items()),
        "",
        *(f"{line:<{len(command) + 13}}{what}" for line, what in more.items()),
    ]
    return "\n".join(lines) + "\n"


def _gist(doc: str) -> str:
    """Return the beginning of a key's text, up to the first mark that ends a sentence or begins a list or remark."""
    return re.split(r"[.:;,](?:\s|$)| \(", doc, maxsplit=1)[0]


def _cut(line: str) -> str:
    """Return a line that fits a screen; what does not is replaced by an ellipsis."""
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4].rsplit(' ', 1)[0]} ..."


def key_help(entry: str, plain: dict[str, Any], topics: Sequence[str]) -> str:
    """Return the text of `--help KEY` or `--help SECTION`: keys with their types, values, bounds and meanings.

    Args:
        entry: name of an entry point.
        plain: the configuration with the values to show.
        topics: keys and sections. Raises `ConfigError` for one that the entry point does not have.
    """
    tree = entry_point(entry).config
    lines: list[str] = []
    for topic in topics:
        found = [leaf for leaf in leaves(tree) if f"{leaf.key}.".startswith(f"{topic}.")]
        if not found:
            raise unknown_key(topic, tree)
        lines += [line for section in optional_sections(tree) if section.key == topic for line in _section(section)]
        lines += [line for leaf in found for line in _key(leaf, plain)]
        for group, options in groups().items():
            if group == topic:
                lines += [f"{group}={name:<12} {about}" for name, about in options]
    return "\n".join(lines) + "\n"


def _section(section: OptionalSection) -> list[str]:
    return [f"{section.key}=null", *textwrap.wrap(about_optional(section), WIDTH, **_INDENTED)]


def _key(leaf: Leaf, plain: dict[str, Any]) -> list[str]:
    bounds = ", ".join(f"{_BOUNDS[name]} {_number(bound)}" for name, bound in leaf.bounds.items())
    kind = "|".join(leaf.values) or type_name(leaf)
    head = f"{leaf.key}={shown(in_force(plain, leaf))}  [{kind}{', ' if bounds else ''}{bounds}]"
    return [head, *textwrap.wrap(leaf.doc, WIDTH, **_INDENTED)]


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def help_text(entry: str, plain: dict[str, Any]) -> str:
    """Return the text of `--help all`: every key with its type, value, choices and meaning.

    Args:
        entry: name of an entry point.
        plain: the composed configuration with the values to show.
    """
    described = entry_point(entry)
    lines = [
        f"usage: megarl {described.command} [key=value ...] [group=option ...] [+conf=preset or [a,b]]",
        "",
        described.about,
        "",
        "Settings (type, value with this command line, choices):",
    ]
    section, optional = None, {each.key: each for each in optional_sections(described.config)}
    for leaf in leaves(described.config):
        choices = "|".join(leaf.values)
        head = leaf.key.rpartition(".")[0]
        if head != section:
            lines.append("")
            section = head
            if head in optional:
                lines += _optional_help(optional[head], value(plain, head) is not None)
        lines.append(f"  {leaf.key}={shown(in_force(plain, leaf))}  [{choices or type_name(leaf)}]")
        lines.append(f"      {leaf.doc}")
    lines += ["", "Groups (each option is a file that sets keys of one section):", ""]
    for group, options in groups().items():
        lines += [f"  {group}={name:<12} {about}" for name, about in options]
    lines += [
        "",
        "Presets (complete setups from megarl's conf/ and from ./conf/; settings on the command line override them):",
        "",
    ]
    lines += [f"  +{GROUP}={name:<12} {about}" for name, about in presets(Path.cwd() / "conf")]
    lines += [
        "",
        "Flags: --help [KEY ...|all] --version --cfg job [--resolve] [-p SECTION] --multirun --info",
        "       --shell-completion install=bash",
        "With --multirun, a key may have several values, and each is run: optim.lr=1e-3,1e-4",
        "",
    ]
    return "\n".join(lines)


def _optional_help(section: OptionalSection, on: bool) -> list[str]:
    off = "resets it" if section.null_is_defaults else "switches it off"
    state = f"on; {section.key}=null {off}" if on else "a section"
    return [f"  {section.key}={'{}' if on else 'null'}  [{state}]", f"      {about_optional(section)}"]


def about_optional(section: OptionalSection, code: str = "") -> str:
    """Return what an optional section is for and how it is switched on and off. `code` is put around keys."""
    if section.null_is_defaults:
        return f"{section.doc} {code}{section.key}=null{code} sets all of its keys to their defaults."
    return (
        f"{section.doc} Off by default ({code}null{code}): setting one of its keys, or {code}{section.key}={{}}{code}, "
        f"switches it on, {code}{section.key}=null{code} off."
    )


def in_force(plain: dict[str, Any], leaf: Leaf) -> Any:
    """Return a key's value; in a section that is off, its default."""
    return leaf.default if leaf.optional and value(plain, leaf.optional) is None else value(plain, leaf.key)


def type_name(leaf: Leaf) -> str:
    """Return a key's type in YAML's terms, without a bar, which would end a table's cell."""
    return leaf.type.replace("None", "null").replace(" | ", " or ")


def shown(value: Any) -> str:
    """Return a value as it would be typed; a text of several lines with escapes, on one."""
    if isinstance(value, str) and "\n" not in value:
        return value
    return json.dumps(value, separators=(",", ":"))


def value(plain: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key in a composed configuration."""
    node: Any = plain
    for part in key.split("."):
        node = node[part]
    return node


def groups() -> dict[str, list[tuple[str, str]]]:
    """Return the options of each group, each with the first comment of its file."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: [(path.stem, _about(path)) for path in sorted(folder.glob("*.yaml"))] for folder in folders}


def presets(user_folder: Path | None) -> list[tuple[str, str]]:
    """Return the presets, each with the first comment of its file after the package line."""
    files = preset_files(user_folder or conf_folder())
    return [(name, _about(path)) for name, path in sorted(files.items())]


def _about(path: Path) -> str:
    """Return the first comment of a configuration file that is not an instruction to Hydra."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
    return ""
