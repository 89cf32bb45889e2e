"""The definitions of metrics, read from the tables of docs/metrics.md, which is their one home."""

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
"""How the page writes the algorithms that a table or a definition is for."""
_CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True)
class Definition:
    """A row of a table: what a metric is.

    Attributes:
        names: the names in its first cell; K stands for a number, NAME and FUNCTION for what a function calls it.
        unit: as on the page; an en dash: none.
        text: the definition, in Markdown.
        algorithms: names of the algorithms that it is for; empty: all.
    """

    names: tuple[str, ...]
    unit: str
    text: str
    algorithms: frozenset[str]

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
    """Yield the rows of the tables whose first cell has names of metrics."""
    subject: frozenset[str] = frozenset()
    for line in page.splitlines():
        if line.startswith("#"):
            subject = frozenset()
        elif not line.startswith("|"):
            introduced = _algorithms(line.partition(":")[0])
            subject = introduced or subject
        elif len(cells := _cells(line)) == 3 and (names := [name for name in _CODE.findall(cells[0]) if "/" in name]):
            own = _algorithms(cells[2].partition(":")[0]) if ":" in cells[2] else frozenset()
            yield Definition(tuple(names), cells[1], cells[2], own or subject)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


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
