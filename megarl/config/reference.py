"""The page docs/configuration.md: the keys of every entry point.

`python -m megarl.config.reference > docs/configuration.md` updates the page.
"""

from __future__ import annotations

import sys
from typing import Any

from megarl.config.algorithms import entry_points
from megarl.config.compare import CompareConfig
from megarl.config.compose import compose
from megarl.config.help import about_optional, groups, in_force, presets, shown, type_name
from megarl.config.leaf import leaves, optional_sections
from megarl.config.preset_files import GROUP
from megarl.config.resources import shown_resource
from megarl.config.sweep import SweepConfig

_PREAMBLE = """# Configuration

Generated from the schema by `python -m megarl.config.reference > docs/configuration.md`; do not edit by hand.

Any key can be set on the command line: `python -m megarl.train_sft optim.lr=1e-4 parallel.tp=2`. Values come from
the schema's defaults, the groups, the entry point's own defaults, presets (`+conf=NAME`, `+conf=[a,b]`) and the command
line; later ones override earlier ones. The defaults below are those of an entry point without presets and without a
command line. `${resource:FILE}` is a file inside the installed package. `--cfg job` prints the configuration without
running it, and `--multirun` runs once per value: `--multirun optim.lr=1e-3,1e-4`.
"""

_ABOUT_PRESETS = """## Presets

A preset is a YAML file whose first line is `# @package _global_`, directly in megarl's `conf/` or in `./conf/` of the
folder in which a run is started. Your preset replaces a shipped one of the same name.
"""

_ABOUT_PROCESSES = """## How many processes

Under `torchrun` or SLURM, the launcher sets the number of processes, and `trainer.devices` and `trainer.num_nodes` have
no effect. Without a launcher, megarl starts `trainer.devices` processes on each of `trainer.num_nodes` machines. The
data-parallel size is the number of processes divided by `tp * pp * cp`, and
`global_batch_size = micro_batch_size * accumulation * data-parallel size` gives the accumulation.
`parallel.sequence_parallel` has no effect when `parallel.tp` is 1. Where these do not divide over the processes,
`launch.elastic=true` takes the nearest values that do.

In a multirun each job has a separate run folder: `run.dir/NUMBER`, or `runs/multirun-TIME/NUMBER` when
`run.dir` is null.
"""


def page() -> str:
    """Return the text of docs/configuration.md."""
    lines = [_PREAMBLE, "## Entry points", "", "| program | what it does |", "| --- | --- |"]
    lines += [f"| `megarl.{each.program}` | {each.about} |" for each in entry_points().values()]
    lines += ["", "## Groups", "", "| option | what it is for |", "| --- | --- |"]
    for group, options in groups().items():
        lines += [f"| `{group}={name}` | {about} |" for name, about in options]
    lines += ["", _ABOUT_PRESETS, "| preset | what it is for |", "| --- | --- |"]
    lines += [f"| `+{GROUP}={name}` | {about} |" for name, about in presets(None)]
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
                    lines += [about_optional(optional[head], code="`"), ""]
                lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
                section = head
            kind = ", ".join(leaf.values) or type_name(leaf)
            lines.append(f"| `{leaf.key}` | {kind} | `{shown(portable(in_force(plain, leaf)))}` | {leaf.doc} |")
    for name, kinds in (("sweep", SweepConfig), ("compare", CompareConfig)):
        lines += ["", f"## Keys of `megarl {name}`", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for leaf in leaves(kinds):
            kind = ", ".join(leaf.choices) or type_name(leaf)
            lines.append(f"| `{name}.{leaf.key}` | {kind} | `{shown(leaf.default)}` | {leaf.doc} |")
    return "\n".join([*lines, "", _ABOUT_PROCESSES])


def portable(value: Any) -> Any:
    """Return a composed value in which paths of shipped files do not depend on where megarl is installed."""
    return [shown_resource(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.stdout.write(page())
