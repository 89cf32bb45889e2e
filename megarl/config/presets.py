"""What Hydra composes: the primary configuration of an entry point, and presets, which are whole-tree YAML files chosen
with `+conf=NAME`."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.config.algorithms import EntryPoint, entry_point, entry_points
from megarl.config.leaf import leaves
from megarl.config.messages import describe_type, one_of
from megarl.config.optional import opened, prepare_preset, set_sections
from megarl.config.renames import RENAMES, keys, renamed_tree
from megarl.config.resources import conf_folder, demo_eval, resource
from megarl.disk import UnreadableError, check_yaml, is_file, read_text, shown
from megarl.errors import ConfigError

GROUP = "conf"
HEADER = "# @package _global_"


def preset_files(user_folder: Path) -> dict[str, Path]:
    """Presets by name: the shipped ones, then the user's, which replace shipped ones of the same name."""
    return {path.stem: path for folder in (conf_folder(), user_folder) for path in sorted(_presets_in(folder))}


def chosen_presets(argv: list[str]) -> list[str]:
    """Names given to `+conf=` on a command line, in order."""
    values = (part.partition("=")[2] for part in argv if part.lstrip("+").startswith(GROUP + "="))
    return [name.strip(" '\"") for value in values for name in value.strip("[] ").split(",") if name.strip()]


def register(argv: list[str], entry: str) -> None:
    """Make the schema, the primary configuration, the resolvers and all presets known to Hydra.

    Registered presets are replaced every time, so that a process that changes folder never sees stale ones.

    Args:
        argv: the command line; the presets it asks for must exist and be readable.
        entry: the entry point; what a preset says to others only is left out.
    """
    OmegaConf.register_new_resolver("resource", resource, replace=True)
    OmegaConf.register_new_resolver("demo_eval", demo_eval, replace=True)
    store = ConfigStore.instance()
    described = entry_point(entry)
    store.store(name=_schema(described), node=opened(described.config))
    store.store(name=described.program, node=_primary(described))
    user_folder = Path.cwd() / "conf"
    files = preset_files(user_folder)
    chosen = chosen_presets(argv)
    for name in chosen:
        if name not in files:
            raise _unknown(name, list(files), user_folder)
    store.repo.pop(GROUP, None)
    of_others = _of_others(described.config)
    set_later = set_sections(argv, described.config)
    for name, path in files.items():
        try:
            part = _load(path)
        except (yaml.YAMLError, UnreadableError) as error:
            if name in chosen:
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"preset '{name}' cannot be read ({path}): {reason}", key="preset", value=name, where=path
                ) from error
            continue  # a broken file that nobody asked for does not concern this run
        plain = OmegaConf.to_container(part)
        assert isinstance(plain, dict)
        own = _without(plain, of_others)
        if name in chosen:
            own = renamed_tree(own, described.config, where=str(path))
            _check_lists(own, described.config, path)
        prepare_preset(own, described.config, set_later)
        store.store(group=GROUP, name=name, node=own, package="_global_", provider=str(path))


def _schema(described: EntryPoint) -> str:
    return f"schema_{described.name}"


def _primary(described: EntryPoint) -> DictConfig:
    """The configuration that Hydra starts from. Later parts win: the schema, the groups, the entry point's defaults."""
    primary = OmegaConf.create(
        {
            "defaults": [
                _schema(described),
                *({group: option} for group, option in described.groups.items()),
                "_self_",
                {"override hydra/job_logging": "disabled"},
                {"override hydra/hydra_logging": "disabled"},
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


def _load(path: Path) -> DictConfig:
    text = read_text(path)
    check_yaml(text)
    try:
        part = OmegaConf.load(io.StringIO(text))
    except RecursionError:
        raise UnreadableError("it is nested too deep") from None
    except (OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise UnreadableError(str(error)) from None
    if not isinstance(part, DictConfig):
        raise UnreadableError("it is not a mapping of sections to keys")
    return part


def _of_others(tree: type) -> set[str]:
    """Keys that other trees have and this one has not, so that one preset can serve a family of entry points."""
    trees = {described.config for described in entry_points().values()}
    theirs = {key for other in trees for key in keys(other)} | {rename.old for rename in RENAMES}
    return theirs - keys(tree).keys() - {rename.old for rename in RENAMES if rename.concerns(tree)}


def _without(part: Any, foreign: set[str], prefix: str = "") -> Any:
    """A preset's plain content without some keys; a section that loses all of its keys goes with them."""
    if not isinstance(part, dict):
        return part
    kept = {
        name: _without(node, foreign, f"{prefix}{name}.")
        for name, node in part.items()
        if f"{prefix}{name}" not in foreign or (isinstance(node, dict) and node)
    }
    return {name: node for name, node in kept.items() if node != {} or part[name] == {}}


def _check_lists(part: Any, tree: type, path: Path) -> None:
    """Refuse a mapping in a list's place: of that, OmegaConf does not name the key."""
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


def _presets_in(folder: Path) -> Iterator[Path]:
    """YAML files directly in a folder whose first line marks them as presets."""
    for path in folder.glob("*.yaml"):
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                if lines.readline().strip() == HEADER:
                    yield path
        except OSError:  # a folder of that name, or a file of someone else's
            continue


def _unknown(name: str, known: list[str], user_folder: Path) -> ConfigError:
    """The error for a preset that does not exist, or that is no preset for want of its first line."""
    file = user_folder / f"{name}.yaml"
    if is_file(file):
        return ConfigError(
            f"{file} is no preset: its first line must be '{HEADER}'", key="preset", value=name, where=file
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"did you mean {one_of(near)}? " if near else ""
    return ConfigError(
        f"unknown preset '{name}'; {meant}known presets: {', '.join(sorted(known))} (yours belong in {user_folder})",
        key="preset",
        value=name,
        offers={"preset": near or sorted(known)},
    )
