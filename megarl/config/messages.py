"""Convert errors of Hydra and OmegaConf to one line with the key, the value and the nearest valid alternatives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from megarl.config.leaf import Leaf, hints_of, leaves, optional_sections, section_kind, sections
from megarl.disk import shown
from megarl.errors import ConfigError

EXPLAINED = (HydraException, OmegaConfBaseException, YAMLError, RecursionError)
"""The errors of composition that `explain` converts."""
_KEY = re.compile(r"(\+\+|\+|~)?(?P<name>[^=@]*)(?P<package>@[^=]*)?(?P<value>=.*)?", re.DOTALL)
_NAME = re.compile(r"[\w$-]+([./][\w$-]+)*")

_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def explain(error: Exception, tree: type, argv: Sequence[str]) -> ConfigError:
    """Convert an error of composition to a `ConfigError` of one line.

    Args:
        error: raised by Hydra, OmegaConf or the YAML parser.
        tree: the schema of the entry point.
        argv: the command line, to quote the argument that is wrong.
    """
    known = {item.key: item for item in leaves(tree)}
    source = _source(error)
    if isinstance(error, OverrideParseException):
        return _malformed(error, known)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, RecursionError):
        return ConfigError(
            "the configuration is nested too deep, or a value refers to itself: look for ${...} in it", key="${...}"
        )
    inner = _omegaconf_error(error)
    if isinstance(inner, ConfigKeyError | ConfigAttributeError):
        key = str(inner.full_key or inner.key)
        argument = None if source else _argument(key, argv)
        if argument:
            key = max(key, _name(argument), key=len)  # for `paralel.tp=2`, OmegaConf complains of `paralel`
        return unknown_key(key, tree, argument, source)
    if isinstance(inner, ValidationError) and (key := _leaf_key(inner)) in known:
        return _wrong_type(known[key], inner, argv, source)
    if inner is not None and (wrong := _wrong_list(inner, known, argv)):
        return wrong
    if isinstance(inner, InterpolationResolutionError):
        key = str(inner.full_key)
        if key in known:
            return ConfigError(f"{key}: {_first_line(inner)}", key=key)
        # OmegaConf names a section, not the key in it
        argument = next((shown(part) for part in argv if "${" in part), None)
        place = f"'{argument}'" if argument else source or "a preset"
        return ConfigError(f"in {place}: {_first_line(inner)}", where=argument or place)
    moved = re.match(r"Could not override '([^']+)'\. No match in the defaults list", str(error))
    if moved:
        group = moved.group(1)
        if group == "conf":
            return ConfigError(
                "'conf=...' must be written '+conf=...': presets are added and replace nothing",
                key="conf",
                offers={"conf": ["+conf"]},
            )
        return unknown_key(group, tree, _argument(group, argv) or group)
    if str(error) == "conf appears more than once in the final defaults list":
        return ConfigError("+conf is given twice: write several presets as one list, +conf=[a,b]", key="+conf")
    if inner is not None and "does not support deletion" in str(inner):
        return ConfigError(
            f"'{inner.full_key}' cannot be removed: every key has a value; set another one", key=str(inner.full_key)
        )
    if (absent := re.match(r"Could not delete from config\. '([^']+)' does not exist", str(error))) and absent[
        1
    ] in known:
        return ConfigError(f"'{absent[1]}' cannot be removed: every key has a value; set another one", key=absent[1])
    if ambiguous := re.match(r"Ambiguous value for argument '\+*([^=']*)", str(error)):
        return ConfigError(
            f"{_first_line(error)}: write key=[a,b] for a list, \"key='a,b'\" for text, "
            "or add --multirun to run once per value",
            key=ambiguous[1],
        )
    said = " ".join(str(inner or error).split())
    if inner is not None and "Cannot merge DictConfig with ListConfig" in said and (key := _leaf_key(inner)) in known:
        typed = _argument(key, argv) or key
        value = typed.partition("=")[2] or None
        return ConfigError(f"{typed} is not {describe_type(known[key].type)}", key=_name(typed), value=value)
    if (section := _section_of(said, tree)) is not None:
        return ConfigError(
            f"{section} is a section, not a key with a value: set its keys, {section}.KEY=VALUE", key=section
        )
    full_key = re.search(r" full_key: (?!object_type=)(\S+)", said)
    named = full_key[1] if full_key else None
    if named and not isinstance(error, EXPLAINED):
        return ConfigError(f"{named}: {_first_line(error)}", key=named)
    line = said if isinstance(error, EXPLAINED) else f"the settings cannot be composed ({said})"
    return ConfigError(line, key=named)


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
    if kind == "list[float]":
        return "a list of numbers, [0.5,1]"
    if kind.startswith("list[dict"):
        return "a list of mappings, [{name: value}]"
    if kind.startswith("dict"):
        return "a mapping, {name: value}"
    return " or ".join(_TYPES.get(part, part) for part in kind.split(" | "))


def _omegaconf_error(error: BaseException | None) -> OmegaConfBaseException | None:
    """Return the OmegaConf error that caused a Hydra error; None if there is none."""
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            return error
        error = error.__cause__ or error.__context__
    return None


def _section_of(said: str, tree: type) -> str | None:
    """Return the section that was given a value instead of keys; None if that is not OmegaConf's complaint."""
    found = re.search(r"Merge error: \w+ is not a subclass of (\w+)", said)
    found = found or re.search(r"Invalid type assigned: \w+ is not a subclass of (\w+)", said)
    hints = hints_of(tree)
    kinds = {name: section_kind(hints[name]) for name in sections(tree)}
    kinds |= {section.key: section.kind for section in optional_sections(tree)}
    return next((name for name, kind in kinds.items() if found and kind and kind.__name__ == found[1]), None)


def _leaf_key(error: OmegaConfBaseException) -> str:
    """Return the key of an error, without the index of a list element."""
    return str(error.full_key).partition("[")[0]


def _source(error: Exception) -> str | None:
    """Return the configuration file that Hydra was reading, from the start of its message."""
    found = re.match(r"In '([^']+)'", str(error))
    return found[1] if found else None


def _name(argument: str) -> str:
    """Return the key that an argument sets."""
    return argument.lstrip("+~").partition("=")[0]


def _argument(key: str, argv: Sequence[str]) -> str | None:
    """Return the argument that sets a key, a key below it, or a section that contains it."""
    for part in argv:
        name = _name(part)
        if name == key or name.startswith(key + ".") or key.startswith(name + "."):
            return part
    return None


def _malformed(error: OverrideParseException, known: dict[str, Leaf]) -> ConfigError:
    """Return the error for an argument that is not of the form key=value."""
    key, equals, value = error.override.lstrip("+~").partition("=")
    if not equals and key == "conf":
        return ConfigError(f"'{error.override}' does not name a preset: write +conf=NAME", key="conf")
    if not equals:
        near = [key] if key in known else nearest_keys(key, list(known))
        example = near[0] if near else "parallel.tp"
        return ConfigError(
            f"'{shown(error.override)}' has no '=': settings are written key=value, for example {example}=...",
            key=shown(key),
            offers={shown(key): [example]},
        )
    return ConfigError(
        f"cannot read the value of '{shown(error.override)}': quote special characters, \"{key}='{shown(value)}'\"",
        key=key,
        value=value,
    )


def _missing_option(error: MissingConfigException) -> ConfigError:
    """Return the error for an option of a group, or a primary configuration, that does not exist."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or [])
    near = difflib.get_close_matches(option, options, n=3, cutoff=0.5)
    meant = f"; did you mean {one_of(near)}?" if near else ""
    listed = f" (options: {', '.join(options)})" if options else ""
    return ConfigError(
        f"{group or 'the configuration folder'} has no '{option}'{meant}{listed}",
        key=group or None,
        value=option,
        offers={group: options} if group else None,
    )


def _wrong_type(leaf: Leaf, error: ValidationError, argv: Sequence[str], source: str | None) -> ConfigError:
    """Return the error for a value that is not of its key's type."""
    place = f" (in {source})" if source else ""
    below = next((part for part in argv if part.lstrip("+").startswith(leaf.key + ".")), None)
    if below:
        line = f"unknown key in '{below}': '{leaf.key}' has a value and no keys below it{place}"
        return ConfigError(line, key=_name(below), where=source, offers={_name(below): [leaf.key]})
    value = "null" if error.value is None else shown(error.value)
    remedy = f": write {leaf.key}=[{value}]" if leaf.type == "list[str]" else ""
    return ConfigError(
        f"{leaf.key}={value} is not {describe_type(leaf.type)}{remedy} ({leaf.key}: {leaf.doc.rstrip('.')}){place}",
        key=leaf.key,
        value=error.value,
        where=source,
    )


def _wrong_list(error: OmegaConfBaseException, known: Mapping[str, Leaf], argv: Sequence[str]) -> ConfigError | None:
    """Return the error for an argument that sets a list of mappings, or an entry of one, to something else. None if the
    error is about something else."""
    place = str(error.full_key)  # of a wrong element, OmegaConf names its index alone
    for argument in argv:
        key = next((key for key in known if f"{_name(argument)}.".startswith(f"{key}.")), None)
        if key is None or not known[key].type.startswith("list[dict"):
            continue
        if place.isdigit() or place.startswith(key):
            kind = describe_type(known[key].type)
            line = f"'{shown(argument)}' does not make {key} {kind}: write {key}=[{{name: value}}]"
            return ConfigError(f"{line} ({key}: {known[key].doc.rstrip('.')})", key=key, value=argument)
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
