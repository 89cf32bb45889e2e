"""Checks of single keys: types, choices, bounds and forms, as `leaf` declares them.

Pure Python. Values from files are checked with them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megarl.config.leaf import Leaf, leaves
from megarl.config.messages import describe_type
from megarl.config.offers import either, read
from megarl.disk import shown
from megarl.errors import ConfigError

_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "at_most": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}
SMALLEST, LARGEST = 1e-30, 1e30
"""Smallest and largest magnitude of a number other than 0 that float32 can compute with."""
MOST_INTEGER = 2**63 - 1


def check_values(config: Any, section: str = "") -> None:
    """Refuse values that the declarations of their keys do not allow. In a list, each element is checked.

    Args:
        section: prefix of the keys in messages, as in "model.".
    """
    for leaf in leaves(type(config)):
        key, value = section + leaf.key, read(config, leaf.key)
        if value is None:
            continue
        own = leaf.or_named and ":" in str(value)
        if leaf.choices and value not in leaf.choices and not own:
            raise ConfigError(
                f"{key}={shown(value)} is not a valid value: choose from {either(leaf.values)}",
                key=key,
                value=value,
                offers={key: leaf.choices},
            )
        if leaf.type == "list[str]" and not all(isinstance(part, str) for part in value):
            raise ConfigError(
                f"{key}={shown(value)} contains an element that is not text: write {key}=[a,b]", key=key, value=value
            )
        for one in value if leaf.type.startswith("list") else [value]:
            if isinstance(one, int | float) and not _within(one, leaf):
                kind = describe_type(leaf.type)
                raise ConfigError(
                    f"{key}={shown(value)} is out of range: use {kind}, {_bounds_in_words(one, leaf)}",
                    key=key,
                    value=value,
                )
            if leaf.form is not None:
                leaf.form(key, one)


def _within(value: float, leaf: Leaf) -> bool:
    if isinstance(value, float):
        sensible = value == 0 or SMALLEST <= abs(value) <= LARGEST  # False for NaN
    else:
        sensible = abs(value) <= MOST_INTEGER
    return sensible and all(_BOUNDS[name][1](value, bound) for name, bound in leaf.bounds.items())


def _bounds_in_words(value: float, leaf: Leaf) -> str:
    """Return the bounds of a key, and the general bound of all numbers if the value breaks that."""
    words = [f"{_BOUNDS[name][0]} {_written(bound)}" for name, bound in leaf.bounds.items()]
    largest = LARGEST if isinstance(value, float) else MOST_INTEGER
    if abs(value) > largest and not {"at_most", "below"} & leaf.bounds.keys():
        words.append(f"at most {_written(largest)}")
    if 0 < abs(value) < SMALLEST:
        words.append(f"no closer to 0 than {SMALLEST:g}")
    return " and ".join(words or [f"between -{LARGEST:g} and {LARGEST:g}"])


def _written(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_types(tree: Any, section: str = "") -> None:
    """Refuse values of a tree, read from a file, that are not of their keys' types."""
    for leaf in leaves(type(tree)):
        if leaf.optional and read(tree, leaf.optional) is None:
            continue
        value = read(tree, leaf.key)
        if not _is_of(value, leaf.type):
            raise ConfigError(
                f"{section}{leaf.key}={shown(value)} is not {describe_type(leaf.type)}",
                key=section + leaf.key,
                value=value,
            )


def _is_of(value: object, kind: str) -> bool:
    kinds = kind.split(" | ")
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") in kinds
    if isinstance(value, list):
        return any(all(_is_of(item, each[5:-1]) for item in value) for each in kinds if each.startswith("list["))
    return type(value).__name__ in kinds or (isinstance(value, int) and "float" in kinds)
