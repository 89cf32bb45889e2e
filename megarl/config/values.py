"""Rules of single keys: types, choices, bounds and formats. Rules that join several keys are in `checks`.

Pure Python, and used for what comes out of files, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megarl.config.files import check_name
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
"""Sizes of numbers other than 0 that float32 can still compute with."""
MOST_INTEGER = 2**63 - 1
MOST_PER_NODE = 1024  # processes
COLDEST = 0.01
"""The lowest temperature of draws at random: below it, rounding of logits decides as much as the logits do."""


def check_values(config: Any) -> None:
    """Rules of single keys: choices, bounds and formats. `compose` has applied them already."""
    check_declared(config)
    _check_formats(config)


def check_declared(config: Any, section: str = "") -> None:
    """What the declarations of a tree's keys say: choices and bounds, those of a list for each of its elements.

    Args:
        section: where the tree stands in a larger one, as in "model.".
    """
    for leaf in leaves(type(config)):
        key, value = section + leaf.key, read(config, leaf.key)
        if value is None:
            continue
        if leaf.choices and value not in leaf.choices:
            raise ConfigError(
                f"{key}={shown(value)} is not a valid value: choose from {either(leaf.choices)}",
                key=key,
                value=value,
                offers={key: leaf.choices},
            )
        if leaf.type == "list[str]" and not all(isinstance(part, str) for part in value):
            raise ConfigError(
                f"{key}={shown(value)} holds something that is no text: write {key}=[a,b]", key=key, value=value
            )
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and not _within(one, leaf):
                kind = describe_type(leaf.type)
                raise ConfigError(
                    f"{key}={shown(value)} is out of range: use {kind}, {_bounds_in_words(one, leaf)}",
                    key=key,
                    value=value,
                )


def _within(value: float, leaf: Leaf) -> bool:
    if isinstance(value, float):
        sensible = value == 0 or SMALLEST <= abs(value) <= LARGEST  # NaN is not
    else:
        sensible = abs(value) <= MOST_INTEGER
    return sensible and all(_BOUNDS[name][1](value, bound) for name, bound in leaf.bounds.items())


def _bounds_in_words(value: float, leaf: Leaf) -> str:
    """Its bounds, and the one that all numbers have where that is what the value breaks."""
    words = [f"{_BOUNDS[name][0]} {_written(bound)}" for name, bound in leaf.bounds.items()]
    largest = LARGEST if isinstance(value, float) else MOST_INTEGER
    if abs(value) > largest and not {"at_most", "below"} & leaf.bounds.keys():
        words.append(f"at most {_written(largest)}")
    if 0 < abs(value) < SMALLEST:
        words.append(f"no nearer to 0 than {SMALLEST:g}")
    return " and ".join(words or [f"between -{LARGEST:g} and {LARGEST:g}"])


def _written(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_types(tree: Any, section: str = "") -> None:
    """Refuse a value of a tree, filled from a file, that is not of its key's type."""
    for leaf in leaves(type(tree)):
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
    return type(value).__name__ in kinds or (isinstance(value, int) and "float" in kinds)


def _check_formats(config: Any) -> None:
    """Keys whose text must have a form."""
    devices = config.trainer.devices
    if devices != "auto" and not (isinstance(devices, int) and devices >= 1):
        raise ConfigError(
            f"trainer.devices={shown(devices)} is neither a count nor auto: use 1, 2, ... or auto",
            key="trainer.devices",
            value=devices,
            offers={"trainer.devices": ["auto"]},
        )
    if devices != "auto" and devices > MOST_PER_NODE:
        raise ConfigError(
            f"trainer.devices={shown(devices)} is out of range: use auto, or at most {MOST_PER_NODE}",
            key="trainer.devices",
            value=devices,
            offers={"trainer.devices": ["auto", MOST_PER_NODE]},
        )
    _check_temperatures(config)
    if not hasattr(config, "run"):  # an entry point that does not train
        return
    if config.run.name is not None:
        check_name(config.run.name, "run.name")
    limit = config.trainer.max_time
    if limit is not None and not re.fullmatch(r"[0-9]{1,6}:[0-5][0-9]:[0-5][0-9]", limit):
        raise ConfigError(
            f"trainer.max_time={shown(limit)} is not HH:MM:SS: for two hours use '02:00:00', quoted in YAML",
            key="trainer.max_time",
            value=limit,
        )
    if not config.checkpoint.metric.strip():
        raise ConfigError(
            "checkpoint.metric is empty: use the name of a logged metric, for example eval/loss",
            key="checkpoint.metric",
            value=config.checkpoint.metric,
        )
    if not config.run.resume.strip():
        raise ConfigError(
            "run.resume is empty: use auto, never or a checkpoint folder",
            key="run.resume",
            value=config.run.resume,
            offers={"run.resume": ["auto", "never"]},
        )


def _check_temperatures(config: Any) -> None:
    sweep = getattr(getattr(config, "eval", None), "sweep", None)
    given = [("rollout.temperature", getattr(getattr(config, "rollout", None), "temperature", 0))]
    given += [("eval.sweep.temperature", value) for value in (sweep.temperature if sweep is not None else ())]
    for key, value in given:
        if 0 < value < COLDEST:
            raise ConfigError(
                f"{key}={value} is too low to draw at random with: use 0 for the likeliest token, or at least "
                f"{COLDEST}",
                key=key,
                value=value,
                offers={key: [0, COLDEST]},
            )
