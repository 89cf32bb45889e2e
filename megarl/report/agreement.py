"""The page of a self-test: how far two trainings of the same model are apart, beside what counts as rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megarl.report.bars import legend
from megarl.report.dots import limit_plot
from megarl.report.markup import escape, facts, folded, number, table
from megarl.report.shell import SELFTEST, shell

_MOST_ROWS = 40


@dataclass(frozen=True)
class Agreement:
    """The numbers of a kind from both.

    Attributes:
        alone, layout: values of one process and of the layout.
        limits: largest difference of each that counts as rounding.
        axis: what they are numbered by.
    """

    alone: Sequence[float]
    layout: Sequence[float]
    limits: Sequence[float]
    axis: str

    @property
    def differences(self) -> list[float]:
        """How far the two are apart."""
        return [abs(a - b) for a, b in zip(self.alone, self.layout, strict=True)]

    @property
    def same(self) -> bool:
        """Whether all differences are rounding. NaN is a difference."""
        return all(one <= limit for one, limit in zip(self.differences, self.limits, strict=True))


def agreement_page(layout: str, settings: Sequence[tuple[str, str]], found: Mapping[str, Agreement]) -> str:
    """Return the page.

    Args:
        layout: the layout that was tested.
        settings: names and values (text) of what the test ran with.
        found: the numbers by kind.
    """
    agree = all(one.same for one in found.values())
    verdict = "The layout gives the same numbers." if agree else "The layout gives DIFFERENT numbers."
    rows = [
        [escape(name), number(len(one.alone)), *_worst(one), "same" if one.same else "DIFFERENT"]
        for name, one in found.items()
    ]
    header = ["numbers", "values", "largest difference", "its tolerance", ""]
    figures = "".join(_figure(name, one) for name, one in found.items())
    explained = "Axes are logarithmic. Where the layout gives the very same number, the difference is 0."
    drawn = f'<p>{explained}</p><div class="figures">{figures}</div>'
    sections = [
        ("differences", "Differences and tolerances", table("What was compared", header, rows) + drawn),
        ("settings", "Settings", facts((name, escape(value)) for name, value in settings)),
    ]
    introduction = f'<p class="verdict"><strong>{verdict}</strong></p>'
    return shell(SELFTEST, f"Self-test: {layout} and one process", introduction, sections)


def _figure(name: str, one: Agreement) -> str:
    title = f"Difference of {name} by {one.axis}"
    lost = sum(not math.isfinite(value) for value in one.differences)
    note = f'<p class="caveat">{lost} of the values are not finite, and not drawn.</p>' if lost else ""
    drawn = limit_plot(f"agreement-{name}", title, one.axis, one.differences, one.limits)
    rows = [
        [str(index), f"{a:.7g}", f"{b:.7g}", f"{abs(a - b):.1e}", f"{limit:.1e}"]
        for index, (a, b, limit) in enumerate(zip(one.alone, one.layout, one.limits, strict=True))
    ]
    some = "" if len(rows) <= _MOST_ROWS else f", the first {_MOST_ROWS} of {len(rows)}"
    header = [escape(one.axis), "one process", "layout", "difference", "tolerance"]
    values = table(f"{escape(name)}{some}", header, rows[:_MOST_ROWS], roomy=True)
    return (
        f'<figure class="curve"><figcaption><h3>{escape(name)}</h3>{legend(["difference"], ["tolerance"])}</figcaption>'
        f"{drawn}{note}{folded('Values', values)}</figure>"
    )


def _worst(one: Agreement) -> tuple[str, str]:
    """Return the difference that comes closest to its limit or exceeds it most, with that limit."""
    pairs = list(zip(one.differences, one.limits, strict=True))
    worst = max(pairs, key=lambda pair: pair[0] / pair[1] if math.isfinite(pair[0]) else math.inf)
    return f"{worst[0]:.1e}", f"{worst[1]:.1e}"
