"""Dots as SVG: values with an interval, pairs of values, and values beside their limits on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarl.report.draw import BOTTOM, LEFT, RIGHT, TOP, WIDTH, svg, tick, ticks
from megarl.report.markup import escape, number

MOST_ROWS = 40
"""Maximum number of pairs in a drawing."""
_SIDE, _ROW, _TAIL = 10, 18, 34
_FEWEST_DECADES = 3


def interval_plot(
    identifier: str, title: str, axis: str, mean: float, interval: tuple[float, float] | None, values: Sequence[float]
) -> str:
    """Return values as hollow dots, their mean as a filled one, and its interval as a line. 0 is always there.

    Args:
        identifier: prefix of the identifiers inside it.
        title: what it shows, as text.
        axis: what the values are, for the axis.
        mean: mean of the values.
        interval: interval of the mean; None: there is none.
        values: the values.
    """
    low, high = interval or (mean, mean)
    scale = _Scale.over([0.0, low, high, mean, *values], _SIDE)
    zero = scale.x(0.0)
    body = [scale.axis(60, axis), f'<path class="zero" d="M{zero:.1f} 4V60"/>']
    body += [
        f'<circle class="hollow s7" cx="{scale.x(value):.1f}" cy="18" r="3.5"><title>{number(value)}</title></circle>'
        for value in values
    ]
    ends = "".join(f"M{scale.x(end):.1f} 38V50" for end in (low, high))
    body.append(f'<path class="reach s0" d="M{scale.x(low):.1f} 44H{scale.x(high):.1f}{ends}"/>' if interval else "")
    body.append(f'<circle class="f0" cx="{scale.x(mean):.1f}" cy="44" r="4.5"><title>{number(mean)}</title></circle>')
    reach = f", interval {number(low)} to {number(high)}" if interval else ", without an interval"
    said = f"Mean {number(mean)}{reach}. Values: {', '.join(map(number, values[:MOST_ROWS]))}."
    return svg(identifier, title, said, "".join(body), (WIDTH, 60 + _TAIL))


def pair_plot(
    identifier: str, title: str, axis: str, names: tuple[str, str], pairs: Sequence[tuple[str, float, float]]
) -> str:
    """Return two values in each row, joined by a line: the first as a filled dot, the second as a hollow one.

    Args:
        identifier: prefix of the identifiers inside it.
        title: what it shows, as text.
        axis: what the values are, for the axis.
        names: what the first and the second value of a row are.
        pairs: name of the row and its values; at most `MOST_ROWS` are drawn.
    """
    pairs = pairs[:MOST_ROWS]
    scale = _Scale.over([value for _, *both in pairs for value in both], LEFT + 20)
    bottom = _ROW * len(pairs) + 6
    body = [scale.axis(bottom, axis)]
    for index, (label, first, second) in enumerate(pairs):
        y = index * _ROW + 12
        a, b = scale.x(first), scale.x(second)
        body.append(f'<text class="tick" x="2" y="{y + 3.5}">{escape(label)}</text>')
        body.append(f'<path class="reach s7" d="M{a:.1f} {y}H{b:.1f}"/>')
        body.append(
            f'<circle class="f0" cx="{a:.1f}" cy="{y}" r="4"><title>{escape(names[0])} {number(first)}</title></circle>'
        )
        body.append(
            f'<circle class="hollow ground s1" cx="{b:.1f}" cy="{y}" r="4"><title>{escape(names[1])} {number(second)}'
            "</title></circle>"
        )
    said = " ".join(f"{label}: {names[0]} {number(a)}, {names[1]} {number(b)}." for label, a, b in pairs)
    return svg(identifier, title, said, "".join(body), (WIDTH, bottom + _TAIL))


def limit_plot(identifier: str, title: str, axis: str, values: Sequence[float], limits: Sequence[float]) -> str:
    """Return values on a logarithmic axis with the limit of each as a line. Values of 0 lie on the lowest line, and
    those that are not finite are left out.

    Args:
        identifier: prefix of the identifiers inside it.
        title: what it shows, as text.
        axis: what the values are numbered by.
        values: at least one, none negative.
        limits: the limit of each, above 0.
    """
    finite = [value for value in values if math.isfinite(value)]
    above = [value for value in (*finite, *limits) if value > 0 and math.isfinite(value)]
    top = math.ceil(math.log10(max(above)) + 0.05)
    floor = min(math.floor(math.log10(min(above))), top - _FEWEST_DECADES)
    if not all(finite):
        floor -= 1  # below all decades that a value has

    def y(value: float) -> float:
        return (
            BOTTOM - (max(math.log10(value), floor) - floor) / (top - floor) * (BOTTOM - TOP) if value > 0 else BOTTOM
        )

    def x(index: float) -> float:
        return LEFT + (index + 0.5) / len(values) * (RIGHT - LEFT)

    body = []
    every = -(-(top - floor) // 6)
    for power in range(floor, top + 1, every):
        label = "0" if power == floor and not all(finite) else f"1e{power}"
        body.append(f'<path class="grid" d="M{LEFT} {y(10.0**power):.1f}H{RIGHT}"/>')
        body.append(
            f'<text class="tick" x="{LEFT - 5}" y="{y(10.0**power) + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    for index in sorted({round(one) for one in ticks(0, len(values) - 1, 6)}):
        body.append(f'<text class="tick" x="{x(index):.1f}" y="{BOTTOM + 13}" text-anchor="middle">{index}</text>')
    body.append(
        f'<text class="tick" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 24}" text-anchor="middle">{escape(axis)}</text>'
    )
    body.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    line = "".join(f"M{x(index - 0.5):.1f} {y(limit):.1f}H{x(index + 0.5):.1f}" for index, limit in enumerate(limits))
    body.append(f'<path class="limit" d="{line}"/>')
    for index, (value, limit) in enumerate(zip(values, limits, strict=True)):
        if math.isfinite(value):
            style = "f0" if value <= limit else "f1"
            body.append(
                f'<circle class="{style}" cx="{x(index):.1f}" cy="{y(value):.1f}" r="{3 if len(values) < 40 else 1.6}">'
                f"<title>{escape(axis)} {index}: {number(value)}, limit {number(limit)}</title></circle>"
            )
    largest = max(finite, default=math.nan)
    beyond = sum(not value <= limit for value, limit in zip(values, limits, strict=True))
    said = (
        f"{len(values)} values, the largest {number(largest)}; limits from {number(min(limits))} to "
        f"{number(max(limits))}. {beyond} are above their limit or not finite."
    )
    return svg(identifier, title, said, "".join(body), (WIDTH, BOTTOM + 28))


class _Scale:
    """A horizontal axis that has all of some values."""

    def __init__(self, low: float, high: float, left: float) -> None:
        self.low, self.high, self.left = low, high, left

    @classmethod
    def over(cls, values: Sequence[float], left: float) -> _Scale:
        """Return the axis from the lowest to the highest value, with a margin; `left` is where it begins."""
        low, high = min(values), max(values)
        if not high - low > max(1e-12 * max(abs(low), abs(high)), 1e-150):
            wider = abs(low) * 0.1 or 1.0
            low, high = low - wider, high + wider
        margin = (high - low) * 0.04
        return cls(low - margin, high + margin, left)

    def x(self, value: float) -> float:
        """Return where a value is drawn."""
        return self.left + (value - self.low) / (self.high - self.low) * (WIDTH - _SIDE - self.left)

    def axis(self, bottom: int, label: str) -> str:
        """Return the axis below what is drawn, with lines through it."""
        parts = []
        for value in ticks(self.low, self.high):
            x = self.x(value)
            anchor = "start" if x < 16 else "end" if x > WIDTH - 16 else "middle"
            parts.append(f'<path class="grid" d="M{x:.1f} 0V{bottom}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{bottom + 13}" text-anchor="{anchor}">{tick(value)}</text>'
            )
        middle = (self.left + WIDTH - _SIDE) / 2
        parts.append(
            f'<text class="tick" x="{middle:.1f}" y="{bottom + 27}" text-anchor="middle">{escape(label)}</text>'
        )
        return "".join(parts)
