"""A configuration by attribute, for Python: what is wrong with an assignment is said as on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from megarl.config.messages import EXPLAINED, explain
from megarl.errors import ConfigError

_ALGORITHM = "megarl.algorithm="  # begins the name of a flag: OmegaConf's flags are true or false and have no value


class UnknownKeyError(ConfigError, AttributeError, KeyError):
    """A key that a configuration does not have. `hasattr`, `getattr` with a default and `in` work as ever."""

    def __str__(self) -> str:
        return str(self.args[0])


class Settings(DictConfig):
    """OmegaConf's tree with our words for its errors."""

    def __getattr__(self, key: str) -> Any:
        with _explained(self):
            return super().__getattr__(key)

    def __setattr__(self, key: str, value: Any) -> None:
        with _explained(self):
            super().__setattr__(key, value)

    def __getitem__(self, key: Any) -> Any:
        with _explained(self):
            return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        with _explained(self):
            super().__setitem__(key, value)


def settings_of(config: Any, algorithm: str) -> Settings:
    """A typed tree as `Settings` that remember whose they are, also when they are copied, merged or pickled."""
    tree = OmegaConf.structured(config, flags={_ALGORITHM + algorithm: True})
    assert isinstance(tree, DictConfig)
    _convert(tree)
    assert isinstance(tree, Settings)
    return tree


def algorithm_of(tree: Any) -> str | None:
    """The algorithm whose settings these are, None where nobody has said so: several algorithms may share a tree."""
    flags = (tree._metadata.flags or {}) if isinstance(tree, DictConfig) else {}
    return next((flag.removeprefix(_ALGORITHM) for flag in flags if flag.startswith(_ALGORITHM)), None)


def _convert(tree: DictConfig) -> None:
    """OmegaConf makes the nodes of a tree itself, so their class is changed afterwards."""
    for key in tree:
        node = tree._get_node(key)
        if isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict:
            _convert(node)
    object.__setattr__(tree, "__class__", Settings)


@contextmanager
def _explained(tree: DictConfig) -> Iterator[None]:
    try:
        yield
    except EXPLAINED as error:
        root = tree
        while (above := root.__dict__["_parent"]) is not None:
            root = above
        kind = OmegaConf.get_type(root)
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
