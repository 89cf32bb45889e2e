"""The page of the conformance suite: a table of all pairs of features, with the differences of each case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.report.markup import escape, facts, folded, identifiers, table
from megarl.report.shell import SELFTEST, shell


@dataclass(frozen=True)
class CaseRow:
    """What came out of a case.

    Attributes:
        keys: its features, one or two.
        about: these in words.
        processes: number of processes that it was trained in, or a divisor of it.
        reference: the model of one process that it was compared with.
        state: ok, FAIL or refused.
        reason: why it was refused, or how it ended without numbers.
        differences: objective, kind of numbers, difference, limit, and name of what differs, for each kind.
        seconds: wall-clock time.
    """

    keys: tuple[str, ...]
    about: str
    processes: int
    reference: str
    state: str
    reason: str
    differences: Sequence[tuple[str, str, float, float, str]]
    seconds: float

    @property
    def name(self) -> str:
        """The features, as in tp+pp."""
        return "+".join(self.keys)


def conformance_page(verdict: str, cases: Sequence[CaseRow], settings: Sequence[tuple[str, str]]) -> str:
    """Return the page.

    Args:
        verdict: what came out, in words.
        cases: single features, then pairs.
        settings: names and values (text) of what the suite ran with.
    """
    ids = identifiers("case-", [case.name for case in cases])
    failed = [case for case in cases if case.state == "FAIL"]
    others = [case for case in cases if case.state == "ok"]
    sections = [
        ("pairs", "Pairs of features", _pairs(cases, ids)),
        ("failures", "Failures", "".join(_case(case, ids[case.name]) for case in failed)),
        ("refused", "Refused by a rule", _refused(cases, ids)),
        ("differences", "Differences of the cases that agree", "".join(_case(case, ids[case.name]) for case in others)),
        ("settings", "Settings", facts((name, escape(value)) for name, value in settings)),
    ]
    introduction = f'<p class="verdict"><strong>{escape(verdict)}</strong></p>'
    return shell(SELFTEST, "Conformance: every pair of features and one process", introduction, sections)


def _pairs(cases: Sequence[CaseRow], ids: dict[str, str]) -> str:
    """Return the table of pairs; single features are in the diagonal."""
    by_keys = {frozenset(case.keys): case for case in cases}
    there = [case.keys[0] for case in cases if len(case.keys) == 1]
    rows = []
    for index, row in enumerate(there):
        found = [by_keys.get(frozenset({row, column})) for column in there[: index + 1]]
        cells = [_link(case, ids) if case is not None else "" for case in found]
        rows.append([f"<code>{escape(row)}</code>", *cells, *[""] * (len(there) - len(cells))])
    header = ["", *(f"<code>{escape(key)}</code>" for key in there)]
    names = facts((case.keys[0], escape(case.about)) for case in cases if len(case.keys) == 1)
    return table("Each feature with each other; in the diagonal, alone", header, rows, roomy=True) + names


def _link(case: CaseRow, ids: dict[str, str]) -> str:
    said = f"<strong>{case.state}</strong>" if case.state == "FAIL" else escape(case.state)
    return f'<a href="#{ids[case.name]}" aria-label="{escape(case.name)}: {escape(case.state)}">{said}</a>'


def _case(case: CaseRow, identifier: str) -> str:
    """Return the differences of a case, folded unless it failed."""
    header = ["objective", "numbers", "largest difference", "its tolerance", "of", ""]
    rows = [
        [
            escape(objective),
            escape(quantity),
            f"{size:.1e}" if math.isfinite(size) else "not finite",
            f"{limit:.1e}",
            f"<code>{escape(where)}</code>",
            "same" if size <= limit else "<strong>DIFFERENT</strong>",
        ]
        for objective, quantity, size, limit, where in case.differences
    ]
    processes = "1 process" if case.processes == 1 else f"{case.processes} processes"
    caption = f"{escape(case.about)}: {processes}, {case.seconds:.1f} s, compared with {escape(case.reference)}"
    content = (table(caption, header, rows, roomy=True) if rows else "") + (
        f"<pre>{escape(case.reason)}</pre>" if case.reason else ""
    )
    if case.state == "FAIL":
        return f'<h3 id="{identifier}">{escape(case.name)}</h3>{content}'
    return folded(f"<code>{escape(case.name)}</code>", content, identifier=identifier)


def _refused(cases: Sequence[CaseRow], ids: dict[str, str]) -> str:
    """Return the cases that a rule forbids, those with the same reason together."""
    by_reason: dict[str, list[CaseRow]] = {}
    for case in cases:
        if case.state == "refused":
            by_reason.setdefault(case.reason, []).append(case)
    rows = [
        [" ".join(f'<code id="{ids[case.name]}">{escape(case.name)}</code>' for case in refused), escape(reason)]
        for reason, refused in by_reason.items()
    ]
    return table("What is refused, and why", ["cases", "reason"], rows) if rows else ""
