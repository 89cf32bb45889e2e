"""What gives the scores of responses: a function, a reward model, reward servers, or a weighted sum of these."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from megarl.config.forms import server_url
from megarl.disk import shown
from megarl.errors import ConfigError

FN, MODEL, URL = "fn", "model", "url"
KINDS = (FN, MODEL, URL)
_ENTRIES = (*KINDS, "weight", "name", "options")
_NAMES = {MODEL: "reward_model", URL: "reward_server"}
_EXAMPLE = (
    "write {fn: rewards.py:score, weight: 0.5}, {model: PATH} or {url: [http://HOST:PORT]}, each also with a name, and "
    "a function with options"
)


@dataclass(frozen=True)
class Term:
    """One source of scores.

    Attributes:
        kind: fn, model or url.
        value: name of a function, path of a reward model, or URLs of servers.
        key: the configuration key that names it, for messages.
        weight: its weight in the sum.
        name: the name under which its scores are logged.
        options: keyword arguments of a function.
        role: name of a reward model's role.
    """

    kind: str
    value: Any
    key: str
    weight: float = 1.0
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    role: str = ""


def read_terms(entries: Sequence[Mapping[str, Any]], key: str) -> list[Term]:
    """Return the terms that a list in the configuration describes. Every name is unique."""
    terms: list[Term] = []
    for number, entry in enumerate(entries):
        kind = next(kind for kind in KINDS if kind in entry)
        value = [entry[kind]] if kind == URL and isinstance(entry[kind], str) else entry[kind]
        own = "combined" if re.search(r"\s\+\s|\*", str(value)) else str(value).rpartition(":")[2]
        name = entry.get("name") or _NAMES.get(kind) or own
        models = sum(term.kind == MODEL for term in terms)
        terms.append(
            Term(
                kind,
                value,
                f"{key}[{number}].{kind}",
                float(entry.get("weight", 1.0)),
                numbered(name, [term.name for term in terms]),
                entry.get("options") or {},
                role=("reward" if not models else f"reward_{models + 1}") if kind == MODEL else "",
            )
        )
    return terms


def numbered(name: str, taken: Sequence[str]) -> str:
    """Return a name, numbered if others have it."""
    unique, count = name, 2
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    return unique


def reward_term(key: str, value: Any) -> None:
    """Refuse what does not describe a term: one source of scores, with a weight, a name and options."""

    def refused(problem: str, entry: str | None = None, offers: Sequence[str] = ()) -> ConfigError:
        found = value if entry is None else value[entry]
        return ConfigError(
            f"{key}: {problem}: {_EXAMPLE}",
            key=key,
            value=found,
            offers={key: list(offers)} if offers else {},
        )

    if not isinstance(value, dict):
        raise refused(f"{shown(value)} is not a term")
    for name in value:
        if name not in _ENTRIES:
            near = get_close_matches(str(name), _ENTRIES)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise refused(f"{shown(name)} is no entry of a term{meant}", name, near or _ENTRIES)
    kinds = [kind for kind in KINDS if value.get(kind)]
    if len(kinds) != 1 or len([kind for kind in KINDS if kind in value]) != 1:
        raise refused(f"{shown(value)} has {len(kinds)} of fn, model and url, and a term has exactly one", None, KINDS)
    kind = kinds[0]
    if kind == URL:
        urls = [value[URL]] if isinstance(value[URL], str) else value[URL]
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            raise refused(f"url={shown(urls)} is not a list of URLs", URL)
        for url in urls:
            server_url(f"{key}.url", url)
    elif not isinstance(value[kind], str):
        raise refused(f"{kind}={shown(value[kind])} is not text", kind)
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise refused(f"weight={shown(weight)} is not a finite number", "weight")
    name = value.get("name")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise refused(f"name={shown(name)} is not a word of letters, digits and _", "name")
    options = value.get("options")
    if options is not None and (kind != FN or not isinstance(options, dict)):
        what = "belongs to a function" if kind != FN else "is not a mapping of keyword arguments"
        raise refused(f"options={shown(options)} {what}", "options")
