"""The commands of a chat: what a line asks for, and the settings that `/set` changes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megarl.config.leaf import Leaf, leaves
from megarl.config.messages import describe_type
from megarl.config.sections.rollout import ResponsesConfig
from megarl.config.values import check_values
from megarl.disk import shown
from megarl.errors import ConfigError

COMMANDS = {
    "set": ("KEY VALUE", "change how answers are sampled: {keys}"),
    "show": ("", "the model, the settings, and how long the conversation is"),
    "system": ("[TEXT]", "another system message; without TEXT none"),
    "undo": ("", "take back the last message and its answer"),
    "retry": ("", "answer the last message again"),
    "reset": ("", "forget the conversation"),
    "save": ("FILE", "write the conversation to a new file, as JSON that training reads"),
    "load": ("FILE [LINE]", "go on with a conversation of a file"),
    "compare": ("MODEL", "let a second model answer too; /compare off ends that"),
    "help": ("", "this list"),
    "quit": ("", "end the chat (as does Ctrl-D); Ctrl-C stops an answer"),
}
"""What follows a command, and what the command does."""
_OTHER_NAMES = {
    "exit": "quit",
    "q": "quit",
    "bye": "quit",
    "clear": "reset",
    "new": "reset",
    "redo": "retry",
    "again": "retry",
    "regenerate": "retry",
    "settings": "show",
    "config": "show",
    "write": "save",
    "open": "load",
    "?": "help",
    "h": "help",
    "commands": "help",
}
_TAKES_NOTHING = ("show", "undo", "retry", "reset", "help", "quit")
_SETTABLE = {leaf.key: leaf for leaf in leaves(ResponsesConfig) if "." not in leaf.key and leaf.key != "too_long"}


@dataclass(frozen=True)
class Command:
    """A command without its slash, and what follows it. `Command("", text)` is a message to the model."""

    name: str
    rest: str = ""


def settable_keys() -> tuple[str, ...]:
    """Return the keys that `/set` changes."""
    return tuple(_SETTABLE)


def help_lines() -> list[str]:
    """Return the text of `/help`."""
    rows = {f"/{name} {what}".strip(): about for name, (what, about) in COMMANDS.items()}
    width = max(map(len, rows))
    lines = [f"{row:<{width}}  {about}" for row, about in rows.items()]
    lines[0] = lines[0].format(keys=", ".join(_SETTABLE))
    return [*lines, "Anything else is a message to the model; //text is a message that begins with a slash."]


def parse(line: str) -> Command:
    """Return what a line asks for. Raise `ConfigError` for a command that does not exist or lacks something."""
    line = line.strip()
    if not line.startswith("/"):
        return Command("", line)
    if line.startswith("//"):
        return Command("", line[1:])
    name, _, rest = line[1:].partition(" ")
    name, rest = name.lower(), rest.strip()
    if name not in COMMANDS:
        raise _unknown(name)
    if name in _TAKES_NOTHING and rest:
        raise ConfigError(f"/{name} takes nothing after it: write /{name}", key=f"/{name}", value=rest)
    if not rest and name in ("set", "save", "load", "compare"):
        example = {"set": "temperature 0.2", "compare": "runs/mine"}.get(name, "chat.jsonl")
        raise ConfigError(
            f"/{name} needs {COMMANDS[name][0]}, as in /{name} {example}",
            key=f"/{name}",
            offers={f"/{name}": [example]},
        )
    return Command(name, rest)


def changed(settings: ResponsesConfig, rest: str) -> ResponsesConfig:
    """Return settings with the change that follows `/set`: `KEY VALUE`, or `KEY=VALUE`."""
    key, value = key_and_value(rest)
    if key not in _SETTABLE:
        near = difflib.get_close_matches(key.lower(), _SETTABLE, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"/set has no key '{shown(key)}': {meant}keys are {', '.join(_SETTABLE)}",
            key=key,
            offers={key: near or list(_SETTABLE)},
        )
    leaf = _SETTABLE[key]
    if not value:
        raise ConfigError(f"/set {key} needs {describe_type(leaf.type)}: {leaf.doc}", key=key)
    new = replace(settings, **{key: _read(leaf, value)})
    check_values(new)
    return new


def key_and_value(rest: str) -> tuple[str, str]:
    """Return the key and the value in what follows `/set`."""
    key, _, value = re.split(r"(\s*=\s*|\s+|$)", f"{rest.strip()} ", maxsplit=1)
    return key.removeprefix("rollout."), value.strip()


def split_line_number(rest: str) -> tuple[str, int]:
    """Return the file and the line of `/load FILE [LINE]`; the first line if none is given."""
    path, _, number = rest.rpartition(" ")
    return (path.strip(), int(number)) if path.strip() and number.isdecimal() else (rest, 1)


def _read(leaf: Leaf, text: str) -> Any:
    """Return a value of a key's type."""
    kinds = leaf.type.split(" | ")
    if "None" in kinds and text.lower() in ("null", "none", "off"):
        return None
    if leaf.type == "list[str]":
        return _texts(leaf, text)
    for kind in (int, float):
        if kind.__name__ in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    raise ConfigError(
        f"{leaf.key}={shown(text)} is not {describe_type(leaf.type)}: {leaf.doc}", key=leaf.key, value=text
    )


def _texts(leaf: Leaf, text: str) -> list[str]:
    """Return a list of texts: `[a, "b\\n"]` as in YAML, or one text."""
    from yaml import YAMLError, safe_load

    if not text.startswith(("[", '"', "'")):
        return [text]
    try:
        value = safe_load(text)
    except YAMLError:
        value = None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
        raise ConfigError(
            f'{leaf.key}={shown(text)} is not a list of texts: write ["a", "b"]', key=leaf.key, value=text
        )
    return texts


def _unknown(name: str) -> ConfigError:
    near = _OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)), "")
    if name in _SETTABLE:
        near = f"set {name}"
    meant = f"did you mean /{near}? " if near else ""
    return ConfigError(
        f"there is no command /{shown(name)}: {meant}/help lists all, and //{shown(name)} sends it to the model",
        key=f"/{shown(name)}",
        offers={f"/{shown(name)}": [f"/{near}"]} if near else None,
    )


def completions(text: str, line: str) -> Sequence[str]:
    """Return what the word `text` of a line can become, for the TAB key."""
    if line.lstrip().startswith("/set "):
        return [f"{key} " for key in _SETTABLE if key.startswith(text)]
    return [f"/{name} " for name in COMMANDS if f"/{name}".startswith(text)] if text.startswith("/") else []
