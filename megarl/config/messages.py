"""Messages about keys: a misspelt one with the nearest keys, and types in words.

Nothing here imports Hydra or OmegaConf, so that a misspelt key is answered at once; `explain.py` has their errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from megarl.config.leaf import leaves, sections
from megarl.disk import exists, local, shown
from megarl.errors import ConfigError

_KEY = re.compile(r"(\+\+|\+|~)?(?P<name>[^=@]*)(?P<package>@[^=]*)?(?P<value>=.*)?", re.DOTALL)
_NAME = re.compile(r"[\w$-]+([./][\w$-]+)*")

_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def check_argument(argument: str, tree: type) -> None:
    """Refuse an argument that Hydra cannot parse, or for which its error is unclear."""
    short = shown(argument)
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"{short!r} is not valid UTF-8: write settings as key=value in UTF-8", key=repr(short)[1:-1]
        ) from None
    found = _KEY.fullmatch(argument)
    assert found is not None, "every group of the expression may be empty"
    name = found["name"]
    example = "settings are written key=value, for example parallel.tp=2"
    if not name.strip():
        raise ConfigError(
            f"unknown key '' in '{short}': {example}" if found["value"] else f"'{short}' is not a setting: {example}",
            key=short,
        )
    if found["package"] and name.partition(".")[0] not in (*sections(tree), "conf", "hydra", "logger"):
        raise unknown_key(name, tree, short)
    if found["package"]:
        raise ConfigError(
            f"'{short}' moves a group to another key with '@', which is not supported: remove {found['package']}",
            key=found["package"],
        )
    if re.search(r"\d{4301}", argument):  # more than Python's limit
        raise ConfigError(f"'{short}' contains a number of more than 4300 digits: use a shorter one", key=shown(name))
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"unknown key '{shown(name)}' in '{short}': write names joined by single dots, as in parallel.tp",
            key=shown(name),
        )


def unknown_key(key: str, tree: type, argument: str | None = None, source: str | None = None) -> ConfigError:
    """Return the error for a key that the tree does not have, with its location and the nearest keys.

    Args:
        key: the key as it was written.
        tree: the schema of the entry point.
        argument: the argument of the command line that contains it.
        source: the configuration file that contains it, if no argument does.
    """
    known = [item.key for item in leaves(tree)]
    place = f" (in {source})" if source else f" (in '{argument}')" if argument else ""

    def unknown(said: str, meant: Iterable[str]) -> ConfigError:
        return ConfigError(f"unknown key '{key}'{place}{said}", key=key, where=source, offers={key: meant})

    parents = [name for name in known if key.startswith(name + ".")]
    if parents and next(item for item in leaves(tree) if item.key == parents[0]).type.startswith("dict"):
        entry = key.removeprefix(parents[0] + ".")
        return ConfigError(
            f"'{parents[0]}' has no entry '{entry}' yet{place}: add it as {key}=VALUE",
            key=key,
            where=source,
            offers={key: [key]},
        )
    if parents:
        return unknown(f": '{parents[0]}' has a value and no keys below it", [parents[0]])
    if difflib.get_close_matches(key, ["conf", "preset"]):
        return unknown("; did you mean '+conf=NAME', which selects a preset? All keys: --help", ["+conf"])
    near = nearest_keys(key, known if "." in key else [*known, *sections(tree)])
    if near:
        return unknown(f"; did you mean {one_of(near)}? All keys: --help", near)
    section = key.partition(".")[0]
    if section in sections(tree):
        names = [name.partition(".")[2] for name in known if name.startswith(section + ".")]
        return unknown(f"; '{section}' has the keys {', '.join(names)}", [f"{section}.{name}" for name in names])
    return unknown(f"; sections are {', '.join(sections(tree))}. All keys: --help", sections(tree))


def no_equals(argument: str, known: Sequence[str], presets: Collection[str] = ()) -> ConfigError:
    """Return the error for an argument without an '=', with the setting that it looks like.

    Args:
        argument: the argument as it was typed.
        known: the keys of the entry point.
        presets: the names of presets.
    """
    key = argument.lstrip("+~")
    if key == "conf":
        return ConfigError(f"'{argument}' does not name a preset: write +conf=NAME", key="conf")
    near = [key] if key in known else nearest_keys(key, known)
    meant = _setting_of(argument, known, presets) or f"{near[0] if near else 'parallel.tp'}=..."
    return ConfigError(
        f"'{shown(argument)}' has no '=': settings are written key=value, for example {shown(meant)}",
        key=shown(key),
        offers={shown(key): [meant.partition("=")[0]]},
    )


def _setting_of(word: str, known: Sequence[str], presets: Collection[str]) -> str | None:
    """Return the setting that a value without a key probably belongs to; None if it looks like a key."""
    data = next((key for key in ("data.train", "data.eval", "prompts") if key in known), None)
    if word in presets:
        return f"+conf={word}"
    if data and re.search(r"\.(jsonl?|parquet|txt)(\.gz)?$", word):
        return f"{data}={word}" if data == "prompts" else f"{data}=[{word}]"
    if "reward.fn" in known and re.fullmatch(r"[\w./-]+:\w+", word):
        return f"reward.fn={word}"
    return f"model.path={word}" if word not in known and exists(local(word)) else None


def unknown_flag(flag: str, tree: type, flags: Sequence[str]) -> ConfigError:
    """Return the error for a flag that does not exist, with the key that it looks like.

    Args:
        flag: the flag as it was typed, without its value.
        tree: the schema of the entry point.
        flags: the flags that exist.
    """
    name = flag.lstrip("-").replace("-", "_")
    near = nearest_keys(name, [leaf.key for leaf in leaves(tree)], count=1)
    meant = difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)
    if meant:
        remedy = f"did you mean {meant[0]}?"
    elif near:
        remedy = f"settings are written key=value without dashes: did you mean {near[0]}=...? All flags: --help all"
    else:
        remedy = f"settings are written key=value without dashes, as in parallel.tp=2; flags are {', '.join(flags)}"
    offers = {shown(flag): meant or near} if meant or near else {}
    return ConfigError(f"unknown flag '{shown(flag)}': {remedy}", key=shown(flag), offers=offers)


def preset_without_plus() -> ConfigError:
    """Return the error for `conf=NAME`, which has to be `+conf=NAME`."""
    return ConfigError(
        "'conf=...' must be written '+conf=...': presets are added and replace nothing",
        key="conf",
        offers={"conf": ["+conf"]},
    )


def nearest_keys(key: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Return the known keys that are most similar to a mistyped one.

    A similar name in the same section comes first, then the same name in another section, then any similar key.
    """
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if section and k.rpartition(".")[0] == section}
    for found in (
        [siblings[n] for n in difflib.get_close_matches(name, siblings, n=count, cutoff=0.7)],
        [k for k in known if k.rpartition(".")[2] == name],
        difflib.get_close_matches(key, known, n=count, cutoff=0.7),
        [k for k in known if difflib.SequenceMatcher(None, name, k.rpartition(".")[2]).ratio() >= 0.7],
    ):
        if found:
            return found[:count]
    return []


def one_of(names: Iterable[object]) -> str:
    """Return quoted alternatives for a sentence: 'a', 'b' or 'c'."""
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def describe_type(kind: str) -> str:
    """Return a type of the schema in words: `int | None` as "an integer or null"."""
    if kind == "list[str]":
        return "a list, [a,b]"
    if kind == "list[int]":
        return "a list of whole numbers, [0,1]"
    if kind == "list[float]":
        return "a list of numbers, [0.5,1]"
    if kind.startswith("list[dict"):
        return "a list of mappings, [{name: value}]"
    if kind.startswith("dict"):
        return "a mapping, {name: value}"
    return " or ".join(_TYPES.get(part, part) for part in kind.split(" | "))
