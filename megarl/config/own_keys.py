"""Read the keys of a program that has no preset or group, from a command line and from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from megarl.config.arguments import check_arguments
from megarl.config.leaf import leaves
from megarl.config.values import check_values
from megarl.disk import UnreadableError, check_yaml, local, read_text, shown
from megarl.errors import ConfigError, first_line

T = TypeVar("T")
_PLAIN = re.compile(r"[\w./:@%+-]+")


def read_own_keys(kind: type[T], words: Sequence[str], section: str = "") -> T:
    """Return an instance of a dataclass of keys with the values of `key=value` words, typed and checked.

    Args:
        kind: the dataclass.
        words: the words, without the section.
        section: what the user writes before each key, for messages.
    """
    try:
        return _read(kind, words)
    except ConfigError as problem:
        if not section or problem.key not in {leaf.key for leaf in leaves(kind)}:
            raise
        key = f"{section}.{problem.key}"
        offers = {f"{section}.{name}": values for name, values in problem.offers.items()}
        line = f"{section}.{problem}" if str(problem).startswith(problem.key) else f"{key}: {problem}"
        raise ConfigError(line, key=key, value=problem.value, offers=offers) from problem.__cause__


def _read(kind: type[T], words: Sequence[str]) -> T:
    check_arguments(words, kind)
    from omegaconf import OmegaConf

    from megarl.config.explain import EXPLAINED, explain

    for word in words:
        try:
            OmegaConf.from_dotlist([word])
        except EXPLAINED as error:
            raise ConfigError(
                f"'{shown(word)}' cannot be read: {' '.join(str(error).split())}", key=shown(word)
            ) from error
    try:
        given = OmegaConf.from_dotlist(list(words))
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except EXPLAINED as error:
        raise explain(error, kind, words) from error
    check_values(config)
    found: T = config
    return found


def help_lines(kind: type, section: str) -> list[str]:
    """Return two lines of help for each key of a dataclass of keys: its default and type, and what it means."""
    found = []
    for leaf in leaves(kind):
        choices = "|".join(leaf.choices) or leaf.type
        found += [f"  {section}.{leaf.key}={json.dumps(leaf.default)}  [{choices}]", f"      {leaf.doc}"]
    return found


def read_mapping(path: str, key: str) -> dict[str, Any]:
    """Return the mapping in the YAML file that a key names."""
    import yaml

    try:
        text = read_text(local(path))
        check_yaml(text)
        found = yaml.safe_load(text)
    except UnreadableError as problem:
        raise ConfigError(f"{key}={shown(path)} {problem}", key=key, value=path, where=path) from None
    except yaml.YAMLError as problem:
        raise ConfigError(
            f"{key}={shown(path)} is not YAML ({first_line(problem)})", key=key, value=path, where=path
        ) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{key}={shown(path)} is not a mapping of keys to values", key=key, value=path, where=path)
    return found


def words_of(settings: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield settings, nested or with dotted keys, as words for a command line: `optim.lr=0.001`."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from words_of(value, f"{section}{name}.")
        else:
            yield f"{section}{name}={written(value)}"


def written(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{written(one)}" for name, one in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
