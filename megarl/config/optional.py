"""Composition of optional sections, and of mappings that the command line empties.

Hydra and OmegaConf cannot set a key below null. So Hydra composes with a schema in which the keys of every optional
section are missing. Afterwards a section in which every key is still missing becomes null. In other sections, missing
keys get their defaults.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from megarl.config.leaf import Leaf, OptionalSection, leaves, optional_sections
from megarl.config.renames import value_of


@cache
def schema(tree: type) -> DictConfig:
    """Return the schema of an entry point. It is made once: merge from it, do not change it."""
    found = OmegaConf.structured(tree)
    assert isinstance(found, DictConfig)
    return found


@cache
def opened(tree: type) -> DictConfig:
    """Return the schema that Hydra composes with, in which the keys of optional sections are missing. It is made once:
    Hydra copies what it composes from."""
    found = OmegaConf.structured(tree)
    assert isinstance(found, DictConfig)
    for section in optional_sections(tree):
        node = OmegaConf.structured(section.kind)
        for leaf in leaves(section.kind):
            OmegaConf.update(node, leaf.key, _unset(leaf))
        parent, _, name = section.key.rpartition(".")
        holder = OmegaConf.select(found, parent) if parent else found
        holder[name] = node
    return found


def settle(plain: dict[str, Any], tree: type, argv: Sequence[str]) -> None:
    """Make every optional section of a composed configuration null or complete, in place.

    Args:
        plain: the configuration as plain dictionaries, with missing values as OmegaConf writes them.
        argv: the command line. SECTION={} switches a section on with all keys at their defaults. MAPPING={} removes
            the entries that presets and earlier arguments set, which Hydra would keep.
    """
    _empty_mappings(plain, tree, argv)
    switched_on = {key for argument in argv for key, value in [_assigned(argument)] if value == "{}"}
    for section in optional_sections(tree):
        holder, name = _holder(plain, section.key)
        if holder is None or not isinstance(holder.get(name), dict):
            continue
        holder[name] = settled(holder[name], section, switched_on)


def _empty_mappings(plain: dict[str, Any], tree: type, argv: Sequence[str]) -> None:
    """Remove entries of mappings that are older than MAPPING={} on the command line, in place."""
    for key in [leaf.key for leaf in leaves(tree) if leaf.type.startswith("dict")]:
        kept: set[str] | None = None  # entries that are set after MAPPING={}; None: there is no such argument
        for argument in argv:
            name, text = _assigned(argument)
            if name == key and text == "{}":
                kept = set()
            elif kept is not None and name == key:
                kept |= set(value_of(argument))
            elif kept is not None and name.startswith(f"{key}."):
                kept.add(name.removeprefix(f"{key}.").partition(".")[0])
        holder, last = _holder(plain, key)
        if kept is not None and holder is not None and isinstance(holder.get(last), dict):
            holder[last] = {name: value for name, value in holder[last].items() if name in kept}


def settled(keys: dict[str, Any], section: OptionalSection, switched_on: Collection[str] = ()) -> Any:
    """Return the keys of one section, completed with its defaults; None if the section is off."""
    given = {name: value for name, value in keys.items() if not _missing(value) and value != {}}
    return {**asdict(section.kind()), **given} if given or section.key in switched_on else None


def reopened(argv: list[str], tree: type) -> list[str]:
    """Return the command line for Hydra, which cannot set a key of a section that an earlier argument sets to null.

    Such a null is replaced by arguments that make every key of the section missing.
    """
    optional = {section.key: section.kind for section in optional_sections(tree)}
    found = []
    for index, argument in enumerate(argv):
        key, value = _assigned(argument)
        if key in optional and value == "null" and key in set_sections(argv[index + 1 :], tree):
            found += [f"{key}.{leaf.key}={_unset(leaf)}" for leaf in leaves(optional[key])]
        else:
            found.append(argument)
    return found


def set_sections(argv: Sequence[str], tree: type) -> set[str]:
    """Return the optional sections that a command line switches on, also by setting one of their keys."""
    assigned = [_assigned(argument) for argument in argv]
    return {
        section.key
        for section in optional_sections(tree)
        for key, value in assigned
        if key.startswith(section.key + ".") or (key == section.key and value != "null")
    }


def prepare_preset(plain: Any, tree: type, set_later: Collection[str]) -> None:
    """Rewrite, in place, optional sections of a preset that Hydra cannot compose.

    Args:
        plain: the content of the preset.
        tree: the schema of the entry point.
        set_later: sections that the command line switches on. Null in the preset is dropped for them.
    """
    for section in optional_sections(tree):
        holder, name = _holder(plain, section.key)
        if holder is None or name not in holder:
            continue
        if holder[name] == {}:
            holder[name] = asdict(section.kind())
        if holder[name] is None and section.key in set_later:
            del holder[name]


def _unset(leaf: Leaf) -> Any:
    """Return the value of a key that is not set: Hydra cannot add an entry to a mapping that is missing."""
    return {} if leaf.type.startswith("dict") else MISSING


def _assigned(argument: str) -> tuple[str, str]:
    """Return the key and the value of an argument, without spaces inside an empty mapping."""
    key, _, value = argument.lstrip("+").partition("=")
    return key, re.sub(r"^\{\s*\}$", "{}", value.strip())


def _missing(value: Any) -> bool:
    """Return whether a key, or every key of a section, is missing."""
    if isinstance(value, dict) and value:
        return all(_missing(one) for one in value.values())
    return isinstance(value, str) and value == MISSING


def _holder(plain: Any, key: str) -> tuple[dict[str, Any] | None, str]:
    """Return the mapping that contains a section (None if there is none) and the section's name in it."""
    *parents, name = key.split(".")
    for part in parents:
        plain = plain.get(part) if isinstance(plain, dict) else None
    return (plain if isinstance(plain, dict) else None), name
