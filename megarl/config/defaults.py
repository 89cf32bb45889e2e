"""The defaults of an entry point, read without Hydra: of the schema, of the groups, and of the table of algorithms."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from megarl.config.algorithms import EntryPoint
from megarl.config.resources import conf_folder, demo_eval

_DEMO_EVAL = "${demo_eval:${data.train}}"
"""The one interpolation in the groups that megarl comes with, in conf/data/demo.yaml."""


def defaults(entry: EntryPoint) -> dict[str, Any]:
    """Return the values of every key when the command line sets none, as nested dictionaries."""
    plain = asdict(entry.config())
    for group, option in entry.groups.items():
        if group in plain:
            text = (conf_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
            keys = yaml.safe_load(text) or {}
            plain[group] |= {key: value for key, value in keys.items() if key in plain[group]}
    for key, value in entry.defaults.items():
        *sections, name = key.split(".")
        holder = plain
        for section in sections:
            holder = holder[section]
        holder[name] = value
    if plain.get("data", {}).get("eval") == _DEMO_EVAL:
        plain["data"]["eval"] = demo_eval(plain["data"]["train"])
    return plain
