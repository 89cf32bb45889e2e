"""Where shipped configuration lies, and presets: whole-tree YAML files chosen with `+conf=NAME`."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.config.leaf import leaves
from megarl.config.messages import describe_type, one_of
from megarl.config.schema import ENTRIES
from megarl.disk import UnreadableError, check_yaml, is_file, read_text, shown
from megarl.errors import ConfigError

GROUP = "conf"
HEADER = "# @package _global_"
DEMO_TRAIN = "data/demo/train.jsonl"
DEMO_EVAL = "data/demo/eval.jsonl"
_PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """The shipped configuration: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"


def resource(path: str) -> str:
    """Absolute path of a file that ships inside the package; behind `${resource:...}` in YAML."""
    return str(_PACKAGE / path)


def shown_resource(value: str) -> str:
    """A path of a file that ships inside the package as YAML has it, whatever folder megarl is in."""
    path = Path(value)
    if not path.is_relative_to(_PACKAGE):
        return value
    return f"${{resource:{path.relative_to(_PACKAGE).as_posix()}}}"


def demo_eval(train: Sequence[str]) -> list[str]:
    """The demo's evaluation set where the demo is trained on; behind `${demo_eval:...}` in YAML."""
    return [resource(DEMO_EVAL)] if resource(DEMO_TRAIN) in train else []


def preset_files(user_folder: Path) -> dict[str, Path]:
    """Presets by name: the shipped ones, then the user's, which replace shipped ones of the same name."""
    return {path.stem: path for folder in (conf_folder(), user_folder) for path in sorted(_presets_in(folder))}


def chosen_presets(argv: list[str]) -> list[str]:
    """Names given to `+conf=` on a command line, in order."""
    values = (part.partition("=")[2] for part in argv if part.lstrip("+").startswith(GROUP + "="))
    return [name.strip(" '\"") for value in values for name in value.strip("[] ").split(",") if name.strip()]


def register(argv: list[str], entry: str) -> None:
    """Make the schemas, the resolvers and all presets known to Hydra.

    Registered presets are replaced every time, so that a process that changes folder never sees stale ones.

    Args:
        argv: the command line; the presets it asks for must exist and be readable.
        entry: the entry point; what a preset says to others only is left out.
    """
    OmegaConf.register_new_resolver("resource", resource, replace=True)
    OmegaConf.register_new_resolver("demo_eval", demo_eval, replace=True)
    store = ConfigStore.instance()
    store.store(name=f"schema_{entry}", node=ENTRIES[entry])
    user_folder = Path.cwd() / "conf"
    files = preset_files(user_folder)
    chosen = chosen_presets(argv)
    for name in chosen:
        if name not in files:
            raise _unknown(name, list(files), user_folder)
    store.repo.pop(GROUP, None)
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
        own = _without(OmegaConf.to_container(part), _of_others(entry))
        if name in chosen:
            _check_lists(own, entry, path)
        store.store(group=GROUP, name=name, node=own, package="_global_", provider=str(path))


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


@cache
def _of_others(entry: str) -> set[str]:
    """Keys that other entry points have and this one has not, so that one preset can serve a family of them."""
    own = {leaf.key for leaf in leaves(ENTRIES[entry])}
    return {leaf.key for tree in ENTRIES.values() for leaf in leaves(tree)} - own


def _without(part: Any, keys: set[str], prefix: str = "") -> Any:
    """A preset's plain content without some keys; a section that loses all of its keys goes with them."""
    if not isinstance(part, dict):
        return part
    kept = {
        name: _without(node, keys, f"{prefix}{name}.") for name, node in part.items() if f"{prefix}{name}" not in keys
    }
    return {name: node for name, node in kept.items() if node != {} or part[name] == {}}


def _check_lists(part: Any, entry: str, path: Path) -> None:
    """Refuse a mapping in a list's place: of that, OmegaConf does not name the key."""
    for leaf in leaves(ENTRIES[entry]):
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
