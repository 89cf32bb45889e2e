"""Check the keys and presets of a command line against the schema, before Hydra is imported.

Importing Hydra and composing takes several times as long as everything here, so a misspelt key is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarl.config.leaf import leaves, optional_sections, sections
from megarl.config.messages import check_argument, no_equals, preset_without_plus, unknown_key
from megarl.config.preset_files import GROUP, chosen_presets, preset_files, unknown_preset
from megarl.config.renames import is_old
from megarl.config.resources import conf_folder


def check_arguments(argv: Sequence[str], tree: type, *, other_folders: bool = False) -> None:
    """Refuse arguments that are not settings, unknown keys and unknown presets.

    Values, keys inside a value and keys inside presets are left to the composition.

    Args:
        argv: the arguments of a command line, without flags.
        tree: the schema of the entry point.
        other_folders: whether a flag of Hydra's adds folders, whose groups may have any name.
    """
    known = {leaf.key: leaf.type for leaf in leaves(tree)}
    names = {*known, *sections(tree), *(section.key for section in optional_sections(tree))}
    for argument in argv:
        if "=" not in argument and argument.isprintable() and argument.strip("+ ") and argument[0] != "~":
            raise no_equals(argument, list(known), preset_files(Path.cwd() / "conf"))
        check_argument(argument, tree)
        name, equals, _ = argument.lstrip("+~").partition("=")
        if name == GROUP and equals and not argument.startswith(("+", "~")):
            raise preset_without_plus()
        if not (name in names or other_folders or _is_known(name, known, tree)):
            raise unknown_key(name, tree, argument)
    _check_presets(chosen_presets(list(argv)))


def _is_known(name: str, known: dict[str, str], tree: type) -> bool:
    """Return whether a name is a preset, a group, a setting of Hydra's, a key below one that may have some, or a key's
    old name."""
    first = name.partition(".")[0].partition("/")[0]
    if name == GROUP or first == "hydra" or ("/" in name and (conf_folder() / name).is_dir()):
        return True
    parent = next((key for key in known if name.startswith(f"{key}.")), None)
    if parent is not None and ("dict" in known[parent] or "list" in known[parent]):
        return True
    return is_old(name, tree)


def _check_presets(names: Sequence[str]) -> None:
    """Refuse presets that neither megarl nor the user's folder has."""
    if names:
        folder = Path.cwd() / "conf"
        known = preset_files(folder)
        for name in names:
            if name not in known:
                raise unknown_preset(name, list(known), folder)
