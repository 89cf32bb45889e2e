"""How a key of the configuration is declared, and how a declared tree is walked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints


def leaf(
    default: Any,
    doc: str,
    choices: Sequence[str] = (),
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare one configuration key.

    Args:
        default: the value when nobody says otherwise; lists and dictionaries are copied per instance.
        doc: one line, shown by `--help` and in docs/configuration.md.
        choices: the only values allowed, for keys that name one of a few things.
        at_least, above, at_most, below: bounds of a number; `None` values of optional keys are exempt.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """Declare a sub-tree of the configuration, built from its own defaults."""
    return field(default_factory=kind)


@dataclass(frozen=True)
class Leaf:
    """One key of a tree as `--help`, the reference page and the checks see it."""

    key: str
    type: str
    default: Any
    doc: str
    choices: tuple[str, ...]
    bounds: dict[str, float]


def leaves(tree: type, prefix: str = "") -> Iterator[Leaf]:
    """Every key of a tree in the order of declaration, sub-trees flattened to dotted keys."""
    hints = get_type_hints(tree)
    for item in fields(tree):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            yield from leaves(hints[item.name], key + ".")
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        kind = hints[item.name]
        yield Leaf(
            key=key,
            type=kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", ()) else str(kind),
            default=default,
            doc=item.metadata.get("doc", ""),
            choices=item.metadata.get("choices", ()),
            bounds=item.metadata.get("bounds", {}),
        )


def sections(tree: type) -> list[str]:
    """Names of a tree's sub-trees."""
    hints = get_type_hints(tree)
    return [item.name for item in fields(tree) if is_dataclass(hints[item.name])]
