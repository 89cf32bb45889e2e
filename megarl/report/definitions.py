"""The definitions of metrics, read from the entries of docs/metrics.md, which is their one home."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from megarl.config.resources import metrics_page
from megarl.disk import UnreadableError, read_text

_ALGORITHMS = {
    **{word: word.lower() for word in ("SFT", "PPO", "GRPO", "RFT", "ILQL", "DPO", "KTO", "ORPO", "CPO")},
    "Reward models": "rm",
}
"""How the page writes the algorithms that a section is for."""
_CODE = re.compile(r"`([^`]*)`")
_ITEM = re.compile(r"- \*\*(Unit|Formula|Normal|If not):\*\* (.*)")


@dataclass(frozen=True)
class Definition:
    """An entry of the page: what a metric is. All texts are Markdown.

    Attributes:
        names: the names in its heading; K stands for a number, NAME and FUNCTION for what a function calls it.
        unit: as on the page; an en dash: none.
        text: the definition.
        algorithms: names of the algorithms that it is for; empty: all.
        formula: how it is computed; empty: not by a formula.
        normal: what is normal.
        remedy: what to do if it is not.
    """

    names: tuple[str, ...]
    unit: str
    text: str
    algorithms: frozenset[str]
    formula: str = ""
    normal: str = ""
    remedy: str = ""

    def matches(self, metric: str) -> bool:
        """Return whether the metric has one of the names."""
        return any(re.fullmatch(_pattern(name), metric) for name in self.names)


@cache
def find_definition(metric: str, algorithm: str = "") -> Definition | None:
    """Return the definition of a metric as an algorithm logs it; None if the page has none.

    Args:
        metric: name, also of an evaluation in a sweep, as in eval/score@temperature=0.7.
        algorithm: name of the algorithm; empty: unknown.
    """
    name = re.sub(r"@\w+=.*$", "", metric)
    found = [each for each in definitions() if name in each.names]
    found = found or [each for each in definitions() if each.matches(name)]
    if not found:  # mentioned beside another one, as the standard error of best@K is
        found = [each for each in definitions() if _mentions(each, name)]
    return min(found, key=lambda each: _distance(each, algorithm), default=None)


@cache
def definitions() -> tuple[Definition, ...]:
    """Return all definitions, in the order of the page; none if the page is not there."""
    try:
        return tuple(_parsed(read_text(metrics_page())))
    except UnreadableError:
        return ()


def _parsed(page: str) -> Iterator[Definition]:
    """Yield the entries: sections of the third level whose heading has names of metrics. The heading of the second
    level says which algorithms they are for."""
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, _, rest = part.partition("\n")
        algorithms = _algorithms(heading.partition(":")[0])
        for entry in re.split(r"^### ", rest, flags=re.MULTILINE)[1:]:
            title, _, body = entry.partition("\n")
            names = tuple(name for name in _CODE.findall(title) if "/" in name)
            if names:
                yield _entry(names, body, algorithms)


def _entry(names: tuple[str, ...], body: str, algorithms: frozenset[str]) -> Definition:
    """Return an entry from what stands below its heading: paragraphs, and a list of a unit and so on."""
    lines = body.strip().splitlines()
    items = {found[1]: found[2] for line in lines if (found := _ITEM.fullmatch(line))}
    text = " ".join(line for line in lines if line and not _ITEM.fullmatch(line))
    return Definition(
        names,
        items.get("Unit", ""),
        text,
        algorithms,
        items.get("Formula", ""),
        items.get("Normal", ""),
        items.get("If not", ""),
    )


def _algorithms(text: str) -> frozenset[str]:
    """Return the algorithms that a text names, if it begins with one."""
    if not text.startswith(tuple(_ALGORITHMS)):
        return frozenset()
    plain = re.sub(r"\([^)]*\)", "", text)
    return frozenset(name for word, name in _ALGORITHMS.items() if re.search(rf"\b{word}\b", plain))


@cache
def _pattern(name: str) -> str:
    """Return a regular expression of a name on the page."""
    escaped = re.escape(name)
    escaped = re.sub(r"\b(NAME|FUNCTION)\b", "[^@]+", escaped)
    return re.sub(r"@K\b|@K(?=_)", r"@\\d+", escaped)


def _mentions(definition: Definition, name: str) -> bool:
    words: Sequence[str] = [word for word in _CODE.findall(definition.text) if "/" in word and "NAME" not in word]
    return any(re.fullmatch(_pattern(word), name) for word in words)


def _distance(definition: Definition, algorithm: str) -> int:
    """Return 0 for a definition of this algorithm, 1 for one of all algorithms, 2 for one of others."""
    if algorithm in definition.algorithms:
        return 0
    return 2 if definition.algorithms else 1
