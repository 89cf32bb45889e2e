"""Convert errors of Hydra and OmegaConf to one line with the key, the value and the nearest valid alternatives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

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
from megarl.config.messages import describe_type, no_equals, one_of, preset_without_plus, unknown_key
from megarl.disk import shown
from megarl.errors import ConfigError

EXPLAINED = (HydraException, OmegaConfBaseException, YAMLError, RecursionError)
"""The errors of composition that `explain` converts."""


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
            return preset_without_plus()
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
    if not equals:
        return no_equals(error.override, list(known))
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
    remedy = f": write {leaf.key}=[{value}]" if leaf.type in ("list[str]", "list[int]") else ""
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
