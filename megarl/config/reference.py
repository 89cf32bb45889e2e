"""The schema as text: what `--help` prints, and docs/configuration.md.

`python -m megarl.config.reference > docs/configuration.md` brings the page up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megarl.config.algorithms import entry_point, entry_points
from megarl.config.leaf import Leaf, OptionalSection, leaves, optional_sections
from megarl.config.presets import GROUP, preset_files
from megarl.config.resources import conf_folder, shown_resource

_PREAMBLE = """# Configuration

Made from the schema by `python -m megarl.config.reference > docs/configuration.md`; do not edit by hand.

Any key can be set on the command line: `python -m megarl.train_sft optim.lr=1e-4 parallel.tp=2`. Values come,
later ones winning, from the schema's defaults, the groups, the entry point's own defaults, presets (`+conf=NAME`,
`+conf=[a,b]`) and the command line. The defaults below are what an entry point has without presets and without a
command line; `${resource:FILE}` is a file inside the installed package. `--cfg job` prints the result without running
it, and `--multirun` runs once per value: `--multirun optim.lr=1e-3,1e-4`.
"""

_ABOUT_PRESETS = """## Presets

A preset is a YAML file whose first line is `# @package _global_`, directly in megarl's `conf/` or in the
`./conf/` of the folder a run is started in; yours replaces a shipped one of the same name.
"""

_ABOUT_PROCESSES = """## How many processes

Under `torchrun` or SLURM the number of processes is what the launcher says, and `trainer.devices` and
`trainer.num_nodes` are not consulted; alone, megarl starts `trainer.devices` processes on each of
`trainer.num_nodes` machines. The data-parallel size is that number divided by `tp * pp * cp`, and
`global_batch_size = micro_batch_size * accumulation * data-parallel size` gives the accumulation.
`parallel.sequence_parallel` has no effect when `parallel.tp` is 1.

In a multirun each job gets a run folder of its own: `run.dir/NUMBER`, or `runs/multirun-TIME/NUMBER` when
`run.dir` is null.
"""


def help_text(entry: str, plain: dict[str, Any]) -> str:
    """Every key of an entry point with its type, value, choices and meaning.

    Args:
        entry: name of an entry point.
        plain: the composed configuration whose values are shown.
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
                lines += _optional_help(optional[head], _value(plain, head) is not None)
        lines.append(f"  {leaf.key}={_shown(_in_force(plain, leaf))}  [{choices or _type(leaf)}]")
        lines.append(f"      {leaf.doc}")
    lines += ["", "Groups (a file each of keys of one section; the first line says what it is for):", ""]
    for group, options in _groups().items():
        lines += [f"  {group}={name:<12} {about}" for name, about in options]
    lines += [
        "",
        "Presets (whole setups, from megarl's conf/ and from ./conf/; settings given besides win):",
        "",
    ]
    lines += [f"  +{GROUP}={name:<12} {about}" for name, about in _presets(Path.cwd() / "conf")]
    lines += [
        "",
        "Flags: --help --version --cfg job [--resolve] [-p SECTION] --multirun --info",
        "       --shell-completion install=bash",
        "With --multirun, values may be lists to run over: optim.lr=1e-3,1e-4",
        "",
    ]
    return "\n".join(lines)


def page() -> str:
    """The text of docs/configuration.md."""
    from megarl.config.compose import compose  # which shows this module's text

    lines = [_PREAMBLE, "## Entry points", "", "| program | what it does |", "| --- | --- |"]
    lines += [f"| `megarl.{each.program}` | {each.about} |" for each in entry_points().values()]
    lines += ["", "## Groups", "", "| option | what it is for |", "| --- | --- |"]
    for group, options in _groups().items():
        lines += [f"| `{group}={name}` | {about} |" for name, about in options]
    lines += ["", _ABOUT_PRESETS, "| preset | what it is for |", "| --- | --- |"]
    lines += [f"| `+{GROUP}={name}` | {about} |" for name, about in _presets(None)]
    for each in entry_points().values():
        lines += ["", f"## Keys of `megarl.{each.program}`"]
        section, plain = None, compose(each.name, [])[1]
        optional = {found.key: found for found in optional_sections(each.config)}
        for leaf in leaves(each.config):
            head = leaf.key.rpartition(".")[0]
            if head != section:
                title = f"### {head}" if head else "### top level"
                lines += ["", title, ""]
                if head in optional:
                    lines += [_about_optional(optional[head], code="`"), ""]
                lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
                section = head
            kind = ", ".join(leaf.choices) or _type(leaf)
            lines.append(f"| `{leaf.key}` | {kind} | `{_shown(portable(_in_force(plain, leaf)))}` | {leaf.doc} |")
    return "\n".join([*lines, "", _ABOUT_PROCESSES])


def _optional_help(section: OptionalSection, on: bool) -> list[str]:
    state = f"on; {section.key}=null switches it off" if on else "a section"
    return [f"  {section.key}={'{}' if on else 'null'}  [{state}]", f"      {_about_optional(section)}"]


def _about_optional(section: OptionalSection, code: str = "") -> str:
    about = section.doc[0].upper() + section.doc[1:]
    return (
        f"{about}. Off by default ({code}null{code}): setting one of its keys, or {code}{section.key}={{}}{code}, "
        f"switches it on, {code}{section.key}=null{code} off."
    )


def _in_force(plain: dict[str, Any], leaf: Leaf) -> Any:
    """A key's value; in a section that is off, the default that it would have."""
    return leaf.default if leaf.optional and _value(plain, leaf.optional) is None else _value(plain, leaf.key)


def portable(value: Any) -> Any:
    """A composed value with the paths of shipped files as YAML has them, the same wherever megarl is installed."""
    return [shown_resource(part) for part in value] if isinstance(value, list) else value


def _type(leaf: Leaf) -> str:
    """A key's type as YAML has it, without the bar that would end a table's cell."""
    return leaf.type.replace("None", "null").replace(" | ", " or ")


def _shown(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))


def _value(plain: dict[str, Any], key: str) -> Any:
    node: Any = plain
    for part in key.split("."):
        node = node[part]
    return node


def _groups() -> dict[str, list[tuple[str, str]]]:
    """Options of each group with their first comment."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: [(path.stem, _about(path)) for path in sorted(folder.glob("*.yaml"))] for folder in folders}


def _presets(user_folder: Path | None) -> list[tuple[str, str]]:
    """Presets with their first comment after the package line."""
    files = preset_files(user_folder or conf_folder())
    return [(name, _about(path)) for name, path in sorted(files.items())]


def _about(path: Path) -> str:
    """The first comment of a configuration file that says something to people."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
    return ""


if __name__ == "__main__":
    sys.stdout.write(page())
