"""Declaration of configuration keys, and iteration over the keys of a declared tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

A_YEAR_S = 31_536_000
"""Upper bound of timeouts in seconds. Timers of the operating system and of torch overflow at larger values."""


hints_of = cache(get_type_hints)
"""The resolved annotations of a class. Resolving takes as long as the rest of a composition."""


class Section:
    """Base class of a section: a dataclass of configuration keys."""

    def check(self) -> None:
        """Raise `Refusal` if the values of the keys cannot be combined."""


def leaf(
    default: Any,
    doc: str,
    choices: Sequence[str] = (),
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    form: Callable[[str, Any], None] | None = None,
    or_named: str = "",
) -> Any:
    """Declare one configuration key.

    Args:
        default: the value of a key that is not set. Lists and dictionaries are copied per instance.
        doc: one line of full sentences, shown by `--help` and in docs/configuration.md.
        choices: the only valid values; empty: any.
        or_named: how an object of the user is named, as in "package.module:function", if one is valid beside `choices`.
        at_least, above, at_most, below: bounds of a number; `None` values of optional keys are exempt.
        form: called with the dotted key and the value, or with each element of a list; raises if its form is not valid.
            `None` values are exempt.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "form": form,
        "or_named": or_named,
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """Declare a sub-tree of the configuration with its own defaults."""
    return field(default_factory=kind)


def optional_section(kind: type, doc: str, *, needs: str = "", null_is_defaults: bool = False) -> Any:
    """Declare a sub-tree that is null, and counts as one key, until one of its keys is set.

    Args:
        kind: the class of the section. It must not contain optional sections.
        doc: one line of full sentences, shown by `--help` and in docs/configuration.md.
        needs: the key without which the section has no effect. A resume treats the section as null if it is empty.
        null_is_defaults: whether the section has the same effect when it is null as with its defaults.
    """
    told = {"doc": doc, "optional": kind, "needs": needs, "null_is_defaults": null_is_defaults}
    return field(default=None, metadata=told)


def or_defaults(section: Any, name: str) -> Any:
    """Return the optional section `name` of a section or tree, with its defaults if it is null."""
    value = getattr(section, name)
    if value is not None:
        return value
    tree: type = type(section)
    kind = section_kind(hints_of(tree)[name])
    assert kind is not None
    return kind()


@dataclass(frozen=True)
class Leaf:
    """One key of a tree, for `--help`, the reference page and the checks."""

    key: str
    type: str
    default: Any
    doc: str
    choices: tuple[str, ...]
    bounds: dict[str, float]
    form: Callable[[str, Any], None] | None = None
    or_named: str = ""
    optional: str = ""
    """Key of the optional section that contains this key; empty: none."""

    @property
    def values(self) -> tuple[str, ...]:
        """The choices, and how an object of the user is named where one is valid; empty: any value."""
        return (*self.choices, self.or_named) if self.or_named else self.choices


@dataclass(frozen=True)
class OptionalSection:
    """A sub-tree that may be null."""

    key: str
    kind: type
    doc: str
    needs: str
    null_is_defaults: bool

    def is_off(self, value: Any) -> bool:
        """Return whether the section has no effect with this value, which is None or a mapping."""
        return value is None or (bool(self.needs) and not value.get(self.needs))


def leaves(tree: type, prefix: str = "", optional: str = "") -> Iterator[Leaf]:
    """Yield every key of a tree in the order of declaration, with dotted keys for sub-trees."""
    hints = hints_of(tree)
    for item in fields(tree):
        key = prefix + item.name
        if (below := section_kind(hints[item.name])) is not None:
            yield from leaves(below, key + ".", key if "optional" in item.metadata else optional)
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
            form=item.metadata.get("form"),
            or_named=item.metadata.get("or_named", ""),
            optional=optional,
        )


def sections(tree: type) -> list[str]:
    """Return the names of a tree's sub-trees."""
    hints = hints_of(tree)
    return [item.name for item in fields(tree) if section_kind(hints[item.name]) is not None]


def optional_sections(tree: type, prefix: str = "") -> Iterator[OptionalSection]:
    """Yield every sub-tree that may be null, in the order of declaration."""
    hints = hints_of(tree)
    for item in fields(tree):
        key, below = prefix + item.name, section_kind(hints[item.name])
        if below is None:
            continue
        if "optional" in item.metadata:
            told = {name: item.metadata[name] for name in ("doc", "needs", "null_is_defaults")}
            yield OptionalSection(key, below, **told)
        else:
            yield from optional_sections(below, key + ".")


def count(tree: type) -> int:
    """Return the number of keys of a tree in `--cfg job`, where an optional section is null and counts as one."""
    return len({leaf.optional or leaf.key for leaf in leaves(tree)})


def section_kind(hint: Any) -> type | None:
    """Return the class of a sub-tree from its annotation, a dataclass or an optional one; None for a key's type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((kind for kind in kinds if is_dataclass(kind) and isinstance(kind, type)), None)
