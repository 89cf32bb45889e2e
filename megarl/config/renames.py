"""Keys that had another name, or another kind of value, in an earlier version. The old spelling works with a warning.

`python -m megarl.config.renames` prints the table of docs/migrate.md.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megarl.config.leaf import leaves, optional_sections
from megarl.errors import ConfigError
from megarl.logging import get_logger, warn_once

_NO_DEFAULT = object()
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Rename:
    """An old key and its replacement.

    Args:
        old: the old key.
        new: the new key. It is the same if only the kind of value has changed.
        value: converts the old value to the new one. None: the value is the same.
        takes: returns whether a value is of the old kind, for a key that has kept its name. None: every value is.
        change: description of the change of the value, for docs/migrate.md.
        only_with: the rename applies only to trees that have this key. Empty: to every tree.
        default: the old key's default. Every earlier checkpoint contains it, so it is dropped from checkpoints. Without
            it, no value is dropped.
        switch: whether the old value switched on or off what is now an optional section of the same name.
    """

    old: str
    new: str
    value: Callable[[Any], Any] | None = None
    takes: Callable[[Any], bool] | None = None
    change: str = ""
    only_with: str = ""
    default: Any = _NO_DEFAULT
    switch: bool = False

    def applies(self, value: Any) -> bool:
        """Return whether a value is of the old kind."""
        return self.takes is None or self.takes(value)

    def concerns(self, tree: type) -> bool:
        """Return whether a tree has the new key, or a mapping of which the new key is an entry."""
        known = keys(tree)
        return (not self.only_with or self.only_with in known) and any(
            self.new == key or (self.new.startswith(f"{key}.") and kind.startswith("dict"))
            for key, kind in known.items()
        )

    def converted(self, value: Any) -> Any:
        """Return the new value of an old one."""
        return value if self.value is None else self.value(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool) or str(value).lower() in _WORDS


def _section_or_null(value: Any) -> dict[str, Any] | None:
    return {} if value is True or _WORDS.get(str(value).lower()) else None


def _switch(key: str) -> Rename:
    """Return the rename of a switch that has become an optional section of the same name."""
    change = "`true`: `{}`, or any of its keys; `false`: `null`"
    return Rename(key, key, _section_or_null, _is_switch, change, switch=True)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _kind_or_null(value: str) -> dict[str, Any] | None:
    return None if value == "none" else {"kind": value}


def _kind(key: str) -> Rename:
    """Return the rename of a choice that has become an optional section of the same name with the key `kind`."""
    change = f"`none`: `null`; `KIND`: `{{kind: KIND}}`, or `{key}.kind=KIND`"
    return Rename(key, key, _kind_or_null, _is_word, change, switch=True)


def _task(old: str, new: str, key: str, only_with: str = "") -> Rename:
    """Return the rename of an entry in a list of data sources, or of a part of a function's name."""
    change = f"`{old}`: `{new}`" + (f" (for entry points with `{only_with}`)" if only_with else "")
    if key.endswith(".fn"):
        return Rename(key, key, lambda name: name.replace(old, new), lambda name: old in str(name), change, only_with)

    def sources(value: Any) -> Any:
        return [new if entry == old else entry for entry in value]

    return Rename(key, key, sources, lambda value: isinstance(value, list) and old in value, change, only_with)


def _is_nemo(value: str) -> bool:
    return value == "nemo"


_OF_NEMO = "`nemo`: `true`; `none`: `false`"
_WALKS = "megarl.tasks.randomwalks"
RENAMES = (
    Rename("data.graph_seed", "data.options.seed", default=1000),
    _task("randomwalks", f"{_WALKS}:samples", "data.train", "data.samples_key"),
    _task("randomwalks", f"{_WALKS}:prompts", "data.train", "rollout.n"),
    _task("randomwalks", f"{_WALKS}:prompts", "data.eval", "rollout.n"),
    _task("randomwalks", f"{_WALKS}:walks", "clone.data"),
    _task("megarl.data.randomwalks:optimality", f"{_WALKS}:optimality", "reward.fn"),
    _task("megarl.data.randomwalks:optimality", f"{_WALKS}:optimality", "metric.fn"),
    Rename("critic.path", "critic.separate.path"),
    Rename("critic.lr", "critic.separate.lr"),
    Rename("critic.warmup_phases", "critic.separate.warmup_phases"),
    Rename("ppo.kl_target", "ppo.adaptive_kl.target"),
    Rename("ppo.kl_horizon", "ppo.adaptive_kl.horizon", default=10_000.0),
    Rename("ppo.missing_eos_penalty", "ppo.overlong.missing_eos_penalty", default=0.0),
    Rename("ppo.mask_overlong", "ppo.overlong.mask", default=False),
    Rename("checkpoint.metric", "checkpoint.best.metric"),
    Rename("checkpoint.mode", "checkpoint.best.mode"),
    Rename("checkpoint.keep_best", "checkpoint.best.keep"),
    *(
        Rename(f"rollout.{name}", f"rollout.engine.{name}")
        for name in ("slots", "cache_bytes", "layout", "cuda_graphs")
    ),
    *(Rename(f"reward.{name}", f"reward.calls.{name}") for name in ("timeout", "retries", "batch_size", "devices")),
    Rename("reward.on_error", "reward.calls.on_error", default="error"),
    Rename("logger.wandb_project", "logger.wandb.project"),
    Rename("logger.wandb_mode", "logger.wandb.mode"),
    _switch("logger.wandb"),
    Rename("logger.mlflow_uri", "logger.mlflow.uri"),
    _switch("logger.mlflow"),
    Rename("trainer.peak_tflops", "health.peak_tflops", default=None),
    Rename("ppo.invariants", "health.invariants", default="strict"),
    Rename("trainer.exp_manager_options", "extensions.exp_manager", default={}),
    *(
        Rename(f"trainer{mark}exp_manager", "extensions.nemo", _is_nemo, change=_OF_NEMO, default="none")
        for mark in "./"  # a key, and a group
    ),
    Rename("model.rope_factor", "model.rope_scaling.factor"),
    Rename("model.rope_low_freq_factor", "model.rope_scaling.low_freq_factor"),
    Rename("model.rope_high_freq_factor", "model.rope_scaling.high_freq_factor"),
    Rename("model.rope_original_positions", "model.rope_scaling.original_positions"),
    _kind("model.rope_scaling"),
)
"""The switch of a section comes after the keys of the section."""


def rename_of(key: str, value: Any, tree: type) -> Rename | None:
    """Return the rename of a key with this value in a tree; None if there is none."""
    for rename in RENAMES:
        if rename.old == key and rename.applies(value) and rename.concerns(tree):
            return rename
    return None


def _of_entry(key: str, tree: type) -> Rename | None:
    """Return the rename of an entry of a mapping that has another name now; None if there is none."""
    for rename in RENAMES:
        mapping = keys(tree).get(rename.new, "").startswith("dict")
        if mapping and key.startswith(f"{rename.old}.") and rename.concerns(tree):
            entry = key.removeprefix(f"{rename.old}.")
            return Rename(key, f"{rename.new}.{entry}")
    return None


def is_old(key: str, tree: type) -> bool:
    """Return whether a key, or the mapping of which it is an entry, had this name in an earlier version."""
    return any(rename.old == key and rename.concerns(tree) for rename in RENAMES) or _of_entry(key, tree) is not None


def renamed_arguments(argv: list[str], tree: type) -> list[str]:
    """Return a command line with today's keys; warn about each old one.

    Args:
        argv: the command line as it was typed. Flags stay as they are.
        tree: the schema of the entry point.
    """
    typed = {_key_of(argument): argument.partition("=")[2] for argument in argv}
    found: list[str] = []
    off: list[str] = []
    last: list[str] = []  # switches of several values: Hydra can set a section to null after its keys, not before
    for switch in (rename for rename in RENAMES if rename.switch and rename.old in typed):
        value = typed[switch.old]
        if switch.applies(value) and switch.converted(value) is None:
            off.append(switch.new)
    for argument in argv:
        key, equals, text = argument.partition("=")
        name = key.lstrip("+~")
        rename = rename_of(name, value_of(argument) if equals else None, tree) or _of_entry(name, tree)
        if rename is None:
            found.append(argument)
            continue
        new = key.removesuffix(name) + rename.new + (equals + _converted(rename, argument, text) if equals else "")
        warn_renamed(rename.old, new)
        if rename.new in typed and rename.new != rename.old and typed[rename.new] != text:
            raise _both(rename, text, typed[rename.new])
        if not any(rename.new.startswith(section + ".") for section in off):  # the section is off: drop its keys
            (last if rename.switch and _sweep(_typed(argument)) else found).append(new)
    return found + last


def renamed_tree(plain: Mapping[str, Any], tree: type, *, warn: bool = True, where: str | None = None) -> Any:
    """Return a configuration, or a section of one, with today's keys.

    Args:
        plain: nested plain values, from a preset or a checkpoint. They are not changed.
        tree: the schema of the entry point.
        warn: whether to warn about old keys.
        where: the file that contains the values, for messages.
    """
    found: Any = copy.deepcopy(dict(plain))
    changes = []
    for rename in RENAMES:
        *parents, name = rename.old.split(".")
        holder: Any = found
        for part in parents:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and name in holder and rename_of(rename.old, holder[name], tree) is rename:
            old = holder.pop(name)
            if warn or old != rename.default:
                changes.append((rename, old))
    for rename, old in changes:
        if warn:
            warn_renamed(rename.old, written(rename, old), where)
        _put(found, rename, rename.converted(old), old)
    return found


def written(rename: Rename, value: Any) -> str:
    """Return how a setting is written now: its new key, with the new value if that differs from the old one."""
    new = rename.converted(value)
    shown = _written(new) if new is None or isinstance(new, dict) else new
    return rename.new if new == value else f"{rename.new}={shown}"


def rows() -> Iterator[str]:
    """Yield the lines of the table in docs/migrate.md."""
    yield "| old key | new key | value |"
    yield "| --- | --- | --- |"
    for rename in RENAMES:
        yield f"| `{rename.old}` | `{rename.new}` | {rename.change or 'the same'} |"


@cache
def keys(tree: type) -> dict[str, str]:
    """Return the type of every key of a tree; for an optional section, the name of its class."""
    found = {leaf.key: leaf.type for leaf in leaves(tree)}
    return {**found, **{section.key: section.kind.__name__ for section in optional_sections(tree)}}


def _put(plain: dict[str, Any], rename: Rename, value: Any, old: Any) -> None:
    """Set a new key. Null switches a section off even if its keys are set; an empty mapping keeps them."""
    *parents, name = rename.new.split(".")
    holder = plain
    for part in parents:
        if not isinstance(holder.get(part), dict):
            holder[part] = {}
        holder = holder[part]
    if isinstance(value, dict) and isinstance(holder.get(name), dict):
        holder[name] = {**holder[name], **value}
        return
    if rename.takes is None and name in holder and holder[name] != value:
        raise _both(rename, old, holder[name])
    holder[name] = value


def _both(rename: Rename, old: Any, new: Any) -> ConfigError:
    return ConfigError(
        f"{rename.old}={old} and {rename.new}={new} set one key, under its old and its new name, to two values: remove "
        f"{rename.old}",
        key=rename.old,
        value=old,
        offers={rename.new: [old, new]},
    )


def warn_renamed(old: str, new: str, where: str | None = None) -> None:
    """Warn once that a setting has changed, with the new way to write it."""
    place = f" (in {where})" if where else ""
    section = new.partition("=")[0].rpartition(".")[0]
    switched = {rename.new for rename in RENAMES if rename.switch}
    effect = f", which switches {section} on" if section in switched else ""
    warn_once(get_logger(__name__), f"{old} has changed{place}: write {new}{effect}, see docs/migrate.md")


def _key_of(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def value_of(argument: str) -> Any:
    """Return the value of an argument, or the first of a multirun's values. It is text if Hydra cannot parse it."""
    value = _typed(argument)
    return _plain((_sweep(value) or [value])[0])


def _converted(rename: Rename, argument: str, text: str) -> str:
    """Return the value of an argument, converted for the new key, in Hydra's syntax."""
    if rename.value is None:
        return text
    value = _typed(argument)
    return ",".join(_written(rename.converted(_plain(one))) for one in _sweep(value) or [value])


def _typed(argument: str) -> Any:
    """Return the value of an argument, or a `ChoiceSweep` of several. It is text if Hydra cannot parse it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow: only where a value is parsed

    try:
        return OverridesParser.create().parse_override(argument)._value
    except Exception:  # composition reports the error
        return argument.partition("=")[2]


def _sweep(value: Any) -> list[Any] | None:
    """Return the values of a `ChoiceSweep`; None if it is one value."""
    from hydra.core.override_parser.types import ChoiceSweep

    return value.list if isinstance(value, ChoiceSweep) else None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return getattr(value, "text", value)  # quoted text is an object with the attribute `text`


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str):
        return value
    return json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
