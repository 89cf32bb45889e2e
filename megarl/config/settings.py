"""A configuration with attributes, for Python. An assignment raises the same errors as the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from megarl.config.explain import EXPLAINED, explain
from megarl.config.leaf import optional_sections
from megarl.config.messages import unknown_key
from megarl.config.renames import Rename, rename_of, warn_renamed, written
from megarl.errors import ConfigError

_ALGORITHM = "megarl.algorithm="  # begins the name of a flag: OmegaConf's flags are true or false and have no value

_AS_USUAL = object()


class UnknownKeyError(ConfigError, AttributeError, KeyError):
    """A key that a configuration does not have. `hasattr`, `getattr` with a default and `in` work as usual."""

    def __str__(self) -> str:
        return str(self.args[0])


class Settings(DictConfig):
    """OmegaConf's tree with megarl's error messages, optional sections, and old names of keys.

    An optional section that is off is an empty `Settings`, equal to None; setting one of its keys switches it on. Its
    keys can be read where null means their defaults.
    """

    def __getattr__(self, key: str) -> Any:
        with _explained(self):
            if (other := _read_otherwise(self, key)) is not _AS_USUAL:
                return other
            return super().__getattr__(key)

    def __setattr__(self, key: str, value: Any) -> None:
        with _explained(self):
            if not _set_renamed(self, key, value):
                with _switched_on(self, key):
                    super().__setattr__(key, value)

    def __getitem__(self, key: Any) -> Any:
        with _explained(self):
            if (other := _read_otherwise(self, key)) is not _AS_USUAL:
                return other
            return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        with _explained(self):
            if not _set_renamed(self, key, value):
                with _switched_on(self, key):
                    super().__setitem__(key, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> DictConfig:
        copied = super().__deepcopy__(memo)
        _convert(copied)
        return copied


def settings_of(config: Any, algorithm: str) -> Settings:
    """Return a typed tree as `Settings`. They store the algorithm, also in copies, merged trees and pickles."""
    tree = OmegaConf.structured(config, flags={_ALGORITHM + algorithm: True})
    assert isinstance(tree, DictConfig)
    _convert(tree)
    assert isinstance(tree, Settings)
    return tree


def algorithm_of(tree: Any) -> str | None:
    """Return the algorithm that the settings were made for; None if unknown, as algorithms may share a tree."""
    flags = (tree._metadata.flags or {}) if isinstance(tree, DictConfig) else {}
    return next((flag.removeprefix(_ALGORITHM) for flag in flags if flag.startswith(_ALGORITHM)), None)


def _convert(tree: DictConfig) -> None:
    """Change the class of a tree's nodes, which OmegaConf makes itself, to `Settings`."""
    for key in () if tree._is_none() else tree:
        node = tree._get_node(key)
        if isinstance(node, DictConfig) and is_dataclass(node._metadata.ref_type):
            _convert(node)
    object.__setattr__(tree, "__class__", Settings)


def _read_otherwise(tree: DictConfig, key: Any) -> Any:
    """Return a value that OmegaConf would not: a section that is off, a key of one, or a key under its old name."""
    if str(key).startswith("_"):
        return _AS_USUAL
    if tree._is_none():
        return _default_of(tree, key)
    content = tree.__dict__["_content"]
    node = content.get(key) if isinstance(content, dict) else None
    if isinstance(node, DictConfig) and node._is_none() and is_dataclass(node._metadata.ref_type):
        _convert(node)
        return node
    rename = _rename_of(tree, key, None) if isinstance(content, dict) and key not in content else None
    if rename is None or rename.value is not None:
        return _AS_USUAL
    warn_renamed(rename.old, rename.new)
    found: Any = _root(tree)
    for part in rename.new.split("."):
        found = found[part]
    return found


def _default_of(tree: DictConfig, key: Any) -> Any:
    """Return the default of a key of a section that is off, if null means the defaults; otherwise refuse to read it."""
    full, kind = str(tree._get_full_key(key)), OmegaConf.get_type(_root(tree))
    _require_known(tree, key)
    known = optional_sections(kind) if is_dataclass(kind) and isinstance(kind, type) else ()
    if any(section.null_is_defaults and full == f"{section.key}.{key}" for section in known):
        return getattr(tree._metadata.ref_type(), key)
    raise UnknownKeyError(f"{full} has no value, as its section is off (null): set {full} first", key=full)


@contextmanager
def _switched_on(tree: DictConfig, key: Any) -> Iterator[None]:
    """Switch an optional section on, with its defaults, before one of its keys is set; off again if that fails."""
    if not tree._is_none():
        yield
        return
    _require_known(tree, key)
    tree._set_value(tree._metadata.ref_type())
    _convert(tree)
    try:
        yield
    except Exception:
        tree._set_value(None)
        raise


def _require_known(tree: DictConfig, key: Any) -> None:
    kind = OmegaConf.get_type(_root(tree))
    if key not in {item.name for item in fields(tree._metadata.ref_type)} and isinstance(kind, type):
        told = unknown_key(str(tree._get_full_key(key)), kind)
        raise UnknownKeyError(str(told), key=told.key, offers=told.offers)


def _set_renamed(tree: DictConfig, key: Any, value: Any) -> bool:
    """Set a key under its old name, or with a value of its old kind. Return whether this is such a key."""
    rename = _rename_of(tree, key, value)
    if rename is None:
        return False
    warn_renamed(rename.old, written(rename, value))
    *sections, name = rename.new.split(".")
    node: Any = _root(tree)
    for section in sections:
        node = node[section]
    new = rename.converted(value)
    if isinstance(new, dict):
        below = node[name]
        if isinstance(below, DictConfig) and below._is_none():
            below._set_value(below._metadata.ref_type())
            _convert(below)
        for part, one in new.items():
            node[name][part] = one
    else:
        node[name] = new
    return True


def _rename_of(tree: DictConfig, key: Any, value: Any) -> Rename | None:
    """Return the rename of a key of a node with this value; None if there is none."""
    kind = OmegaConf.get_type(_root(tree))
    return rename_of(tree._get_full_key(key), value, kind) if is_dataclass(kind) and isinstance(kind, type) else None


def _root(tree: DictConfig) -> DictConfig:
    while (above := tree.__dict__["_parent"]) is not None:
        tree = above
    return tree


@contextmanager
def _explained(tree: DictConfig) -> Iterator[None]:
    try:
        yield
    except EXPLAINED as error:
        kind = OmegaConf.get_type(_root(tree))
        told = (
            explain(error, kind, [])
            if isinstance(kind, type)
            else ConfigError(str(error).partition("\n")[0], key=getattr(error, "key", None))
        )
        missing = isinstance(error, OmegaConfBaseException) and isinstance(error, ConfigAttributeError | ConfigKeyError)
        if missing:
            data = {"key": told.key, "value": told.value, "where": told.where, "offers": told.offers}
            told = UnknownKeyError(str(told), **data)
        raise told from None
