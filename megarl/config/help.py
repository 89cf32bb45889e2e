"""The text of `--help`: the keys, groups and presets of an entry point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarl.config.algorithms import entry_point
from megarl.config.leaf import Leaf, OptionalSection, leaves, optional_sections
from megarl.config.presets import GROUP, preset_files
from megarl.config.resources import conf_folder


def help_text(entry: str, plain: dict[str, Any]) -> str:
    """Return the text of `--help`: every key with its type, value, choices and meaning.

    Args:
        entry: name of an entry point.
        plain: the composed configuration with the values to show.
    """
    described = entry_point(entry)
    lines = [
        f"usage: python -m megarl.{described.program} [key=value ...] [group=option ...] [+conf=preset or [a,b]]",
        "",
        described.about,
        "",
        "Settings (type, value with this command line, choices):",
    ]
    section, optional = None, {each.key: each for each in optional_sections(described.config)}
    for leaf in leaves(described.config):
        choices = "|".join(leaf.choices)
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
        "Flags: --help --version --cfg job [--resolve] [-p SECTION] --multirun --info",
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
