"""The primary configuration of an entry point, and presets: YAML files with keys of any section, selected with
`+conf=NAME`."""

from __future__ import annotations

import io
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.config.algorithms import EntryPoint, entry_point, entry_points
from megarl.config.leaf import leaves
from megarl.config.messages import describe_type
from megarl.config.optional import opened, prepare_preset, set_sections
from megarl.config.preset_files import GROUP, chosen_presets, preset_files, unknown_preset
from megarl.config.renames import RENAMES, keys, renamed_tree
from megarl.config.resources import demo_eval, resource
from megarl.disk import UnreadableError, check_yaml, read_text, shown
from megarl.errors import ConfigError

_OF_HYDRA = ("launcher", "sweeper", "output", "help", "hydra_help", "env")
"""Groups of Hydra's own configuration that only its command line needs."""


def register(argv: list[str], entry: str, *, every: bool = False) -> None:
    """Register the schema, the primary configuration, the resolvers and presets with Hydra.

    Each call replaces the registered presets, so that a process that changes its folder uses the ones there.

    Args:
        argv: the command line. The presets that it names must exist and be readable.
        entry: the entry point. Keys of a preset that only other entry points have are dropped.
        every: register all presets, for a command line that may select them in other ways. Else only those that it
            names, and all if one of these includes others.
    """
    OmegaConf.register_new_resolver("resource", resource, replace=True)
    OmegaConf.register_new_resolver("demo_eval", demo_eval, replace=True)
    store = ConfigStore.instance()
    described = entry_point(entry)
    _store_schema(store, described)
    store.store(name=described.program, node=_primary(described, of_hydra=every))
    user_folder = Path.cwd() / "conf"
    files = preset_files(user_folder)
    chosen = chosen_presets(argv)
    for name in chosen:
        if name not in files:
            raise unknown_preset(name, list(files), user_folder)
    store.repo.pop(GROUP, None)
    contents = {name: _read(name, files[name]) for name in chosen}
    if every or any("defaults" in plain for plain in contents.values()):
        contents = {name: plain for name in files for plain in [_read_any(files[name])] if plain is not None} | contents
    of_others = _of_others(described.config) if contents else set()
    set_later = set_sections(argv, described.config)
    for name, plain in contents.items():
        path = files[name]
        own = _without(plain, of_others)
        if name in chosen:
            own = renamed_tree(own, described.config, where=str(path))
            _check_lists(own, described.config, path)
        prepare_preset(own, described.config, set_later)
        store.store(group=GROUP, name=name, node=own, package="_global_", provider=str(path))


def _store_schema(store: ConfigStore, described: EntryPoint) -> None:
    """Register the schema of an entry point, unless it is there, and forget those of others.

    For every composition, Hydra copies all that the store holds, which takes longer than the rest.
    """
    for other in entry_points().values():
        if other.name != described.name:
            store.repo.pop(f"{_schema(other)}.yaml", None)
    held = store.repo.get(f"{_schema(described)}.yaml")
    if held is None or OmegaConf.get_type(held.node) is not described.config:
        store.store(name=_schema(described), node=opened(described.config))


def _schema(described: EntryPoint) -> str:
    return f"schema_{described.name}"


def _primary(described: EntryPoint, *, of_hydra: bool) -> DictConfig:
    """Return the configuration that Hydra starts from. Later entries override earlier ones.

    Args:
        described: the entry point.
        of_hydra: whether Hydra's own command line runs. Else its launcher, sweeper and help have no use, and to compose
            without them takes half the time.
    """
    own = {"job_logging": "disabled", "hydra_logging": "disabled"} | ({} if of_hydra else dict.fromkeys(_OF_HYDRA))
    primary = OmegaConf.create(
        {
            "defaults": [
                _schema(described),
                *({group: option} for group, option in described.groups.items()),
                "_self_",
                *({f"override hydra/{group}": option} for group, option in own.items()),
            ],
            # megarl has its own run folder and logs: Hydra writes nothing and stays in the folder it was started in.
            "hydra": {
                "output_subdir": None,
                "run": {"dir": "."},
                "job": {"name": described.program, "chdir": False},
                "sweep": {"dir": "runs/multirun-${now:%Y%m%d-%H%M%S}", "subdir": "${hydra.job.num}"},
            },
        }
    )
    for key, value in described.defaults.items():
        OmegaConf.update(primary, key, value)
    return primary


def _read(name: str, path: Path) -> dict[str, Any]:
    """Return the content of a preset that the command line names."""
    try:
        return _load(path)
    except (yaml.YAMLError, UnreadableError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"preset '{name}' cannot be read ({path}): {reason}", key="preset", value=name, where=path
        ) from error


def _read_any(path: Path) -> dict[str, Any] | None:
    """Return the content of a preset, None if it cannot be read: that matters only to a run that names it."""
    try:
        return _load(path)
    except (yaml.YAMLError, UnreadableError):
        return None


def _load(path: Path) -> dict[str, Any]:
    return deepcopy(_parsed(read_text(path)))


@cache
def _parsed(text: str) -> dict[str, Any]:
    """Return the content of a preset's text. Every job of a multirun reads all presets, and parsing takes a while."""
    check_yaml(text)
    try:
        part = OmegaConf.load(io.StringIO(text))
    except RecursionError:
        raise UnreadableError("it is nested too deep") from None
    except (OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise UnreadableError(str(error)) from None
    plain = OmegaConf.to_container(part)
    if not isinstance(plain, dict):
        raise UnreadableError("it is not a mapping of sections to keys")
    return cast("dict[str, Any]", plain)


def _of_others(tree: type) -> set[str]:
    """Return the keys that only other trees have. They are dropped, so that one preset serves several entry points."""
    trees = {described.config for described in entry_points().values()}
    theirs = {key for other in trees for key in keys(other)} | {rename.old for rename in RENAMES}
    return theirs - keys(tree).keys() - {rename.old for rename in RENAMES if rename.concerns(tree)}


def _without(part: Any, foreign: set[str], prefix: str = "") -> Any:
    """Return a preset's plain content without some keys. A section that loses all of its keys is removed."""
    if not isinstance(part, dict):
        return part
    kept = {
        name: _without(node, foreign, f"{prefix}{name}.")
        for name, node in part.items()
        if f"{prefix}{name}" not in foreign or (isinstance(node, dict) and node)
    }
    return {name: node for name, node in kept.items() if node != {} or part[name] == {}}


def _check_lists(part: Any, tree: type, path: Path) -> None:
    """Refuse a mapping as the value of a list, because OmegaConf's error would not name the key."""
    for leaf in leaves(tree):
        section, _, key = leaf.key.rpartition(".")
        keys = (part.get(section) if section else part) if isinstance(part, dict) else None
        if leaf.type.startswith("list") and isinstance(keys, dict) and isinstance(keys.get(key), dict):
            raise ConfigError(
                f"{leaf.key}={shown(keys[key])} is not {describe_type(leaf.type)} (in {path})",
                key=leaf.key,
                value=keys[key],
                where=path,
            )
