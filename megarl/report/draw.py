"""Curves and score distributions as SVG, drawn without a plotting library. Colours and fonts are the page's. Bars are
in bars.py, dots with intervals and on logarithmic axes in dots.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from megarl.command import printable
from megarl.report.data import Point
from megarl.report.markup import as_script, escape, number

WIDTH, HEIGHT = 360, 194
LEFT, RIGHT, TOP, BOTTOM = 50, 352, 8, 166
"""Edges of the plot inside the drawing, in its own units."""
STYLES = 8
"""Number of line styles of the page; further lines begin again."""
_MOST_POINTS, _FEWEST_POINTS = 400, 40
_MARKED = 40  # number of points up to which each has a mark
_LARGEST, _SMALLEST = 1e150, 1e-150


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: its name in the legend and in the readout.
        points: finite values by step, in the order of the steps.
        style: number of its style.
        spread: around its points, by step, the lowest and the highest of the values that a point is the mean of.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    spread: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Lines over the same steps.

    Attributes:
        identifier: prefix of the identifiers inside it.
        title: what it shows, as text.
        unit: what a step is called.
        lines: its lines; at least one has a point.
        bands: spans of steps to shade.
    """

    identifier: str
    title: str
    unit: str
    lines: Sequence[Line]
    bands: Sequence[tuple[int, int]] = ()

    def svg(self) -> str:
        """Return the drawing."""
        drawn, axes = self._drawn, self._axes
        body = [axes.grid(self.unit), *(axes.band(*span) for span in self.bands)]
        body += [
            f'<path class="spread f{line.style % STYLES}" d="{axes.around(line)}"/>' for line in drawn if line.spread
        ]
        for line in drawn:
            body.append(f'<path class="line s{line.style % STYLES}" d="{axes.path(line.points)}"/>')
            if len(line.points) <= _MARKED:
                marks = "".join(
                    f'<circle cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2"/>' for step, value in line.points
                )
                body.append(f'<g class="mark s{line.style % STYLES}">{marks}</g>')
        return svg(self.identifier, self.title, self._described(), "".join(body))

    def data(self) -> str:
        """Return what the page's script needs to show values and to smooth: the drawn points and the axes."""
        drawn, axes = self._drawn, self._axes
        lines: list[dict[str, Any]] = []
        for whole, line in zip(self.lines, drawn, strict=True):
            entry: dict[str, Any] = {
                "label": printable(line.label),
                "style": line.style % STYLES,
                "points": _short(line.points),
            }
            if len(line.points) < len(whole.points):
                entry["means"] = _short(means(_bounded(whole.points), len(line.points) // 2))
            lines.append(entry)
        return as_script(
            {
                "unit": self.unit,
                "xSpan": [axes.left, axes.right],
                "ySpan": [axes.low, axes.high],
                "plot": [LEFT, RIGHT, TOP, BOTTOM],
                "lines": lines,
            }
        )

    @cached_property
    def _axes(self) -> _Axes:
        drawn = self._drawn
        return _Axes.of([point for line in drawn for point in (*line.points, *_edges(line, 0), *_edges(line, 1))])

    @cached_property
    def _drawn(self) -> list[Line]:
        most = max(_MOST_POINTS // max(len(self.lines), 1), _FEWEST_POINTS)
        return [replace(line, points=thin(_bounded(line.points), most)) for line in self.lines]

    def _described(self) -> str:
        """Return the lines in words, for those who do not see them."""
        said = []
        for line in self.lines:
            if not line.points:
                said.append(f"{line.label}: no values.")
                continue
            (first, begin), (last, end) = line.points[0], line.points[-1]
            low, high = min(line.points, key=_value), max(line.points, key=_value)
            said.append(
                f"{line.label}: {number(begin)} at {self.unit} {first}, {number(end)} at {self.unit} {last}, lowest "
                f"{number(low[1])} at {low[0]}, highest {number(high[1])} at {high[0]}."
            )
        return " ".join(said)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` of the points (at least four), in order: the first, the last, and the lowest and highest of
    each of equal parts. So no peak is lost."""
    if len(points) <= most:
        return list(points)
    parts = max((most - 2) // 2, 1)
    kept = {0, len(points) - 1}
    for part in range(parts):
        inside = range(part * len(points) // parts, (part + 1) * len(points) // parts)
        kept.add(min(inside, key=lambda index: points[index][1]))
        kept.add(max(inside, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def means(points: Sequence[Point], parts: int) -> list[Point]:
    """Return the mean of each of equal parts of the points, at the part's last step."""
    parts = min(max(parts, 1), len(points))
    edges = [part * len(points) // parts for part in range(parts + 1)]
    return [
        (points[end - 1][0], sum(value for _, value in points[start:end]) / (end - start))
        for start, end in pairwise(edges)
    ]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most `most` round numbers between two others."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if span / (factor * size) <= most - 1 or factor == 20)
    first = math.ceil(low / step - 1e-9)
    found = [index * step for index in range(first, first + most) if index * step <= high + step * 1e-9]
    return found or [low]


@dataclass(frozen=True)
class _Axes:
    """The spans of steps and values that a drawing shows."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Axes:
        """Return the axes that show all points."""
        steps, values = [step for step, _ in points] or [0], [value for _, value in points] or [0.0]
        left, right = min(steps), max(steps)
        low, high = min(values), max(values)
        if not high - low > max(1e-12 * max(abs(low), abs(high)), _SMALLEST):
            wider = abs(low) * 0.1 or 1.0
            low, high = low - wider, high + wider
        margin = (high - low) * 0.04
        return cls(left, right if right > left else left + 1, low - margin, high + margin)

    def x(self, step: float) -> float:
        return LEFT + (step - self.left) / (self.right - self.left) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def path(self, points: Sequence[Point]) -> str:
        """Return the commands of an SVG path."""
        return "".join(
            f"{'L' if index else 'M'}{self.x(step):.1f} {self.y(value):.1f}"
            for index, (step, value) in enumerate(points)
        )

    def around(self, line: Line) -> str:
        """Return the outline of a line's spread as commands of an SVG path."""
        outline = [*_edges(line, 1), *reversed(_edges(line, 0))]
        return f"{self.path(outline)}Z" if outline else ""

    def band(self, first: int, last: int) -> str:
        begin, end = (min(max(self.x(step), LEFT), RIGHT) for step in (first, last))
        return (
            f'<rect class="band" x="{begin:.1f}" y="{TOP}" width="{max(end - begin, 2):.1f}" height="{BOTTOM - TOP}"/>'
        )

    def grid(self, unit: str) -> str:
        """Return the grid with its labels."""
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick(value)}</text>')
        steps = sorted({round(step) for step in ticks(self.left, self.right, 6)})
        for step in steps:
            x, anchor = self.x(step), "end" if self.x(step) > RIGHT - 12 else "middle"
            parts.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 13}" text-anchor="{anchor}">{tick(step)}</text>')
        parts.append(
            f'<text class="tick" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(unit)}</text>'
        )
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
        return "".join(parts)


def heatmap(
    identifier: str, title: str, description: str, unit: str, columns: Sequence[tuple[int, Sequence[float]]]
) -> str:
    """Return the distribution of values by step: a column for each, in a stronger colour where more values are.

    Args:
        columns: steps with their values, each with at least one.
    """
    columns = [(step, [_within_bounds(value) for value in column]) for step, column in columns]
    values = [value for _, column in columns for value in column]
    axes = _Axes.of([(0, min(values)), (0, max(values))])
    rows, width = 20, (RIGHT - LEFT) / len(columns)
    size = (axes.high - axes.low) / rows
    parts = []
    for value in ticks(axes.low, axes.high):
        y = axes.y(value)
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick(value)}</text>')
    for index, (step, column) in enumerate(columns):
        counts = [0] * rows
        for value in column:
            counts[min(int((value - axes.low) / size), rows - 1)] += 1
        for row, count in enumerate(counts):
            if count:
                y = axes.y(axes.low + size * (row + 1))
                parts.append(
                    f'<rect class="cell" x="{LEFT + index * width:.1f}" y="{y:.1f}" width="{width:.2f}" '
                    f'height="{(BOTTOM - TOP) / rows:.2f}" fill-opacity="{0.12 + 0.88 * count / len(column):.2f}"/>'
                )
        every = max(len(columns) // 6, 1)
        if index % every == 0:
            parts.append(
                f'<text class="tick" x="{LEFT + (index + 0.5) * width:.1f}" y="{BOTTOM + 13}" '
                f'text-anchor="middle">{tick(step)}</text>'
            )
    parts.append(
        f'<text class="tick" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(unit)}</text>'
    )
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    return svg(identifier, title, description, "".join(parts))


def svg(identifier: str, title: str, description: str, body: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    """Return a drawing with its title and with its description for those who do not see it.

    Args:
        identifier: prefix of the identifiers inside it.
        title, description: text.
        body: SVG.
        size: its width and height, in its own units.
    """
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-labelledby="{identifier}-title" '
        f'aria-describedby="{identifier}-desc"><title id="{identifier}-title">{escape(title)}</title>'
        f'<desc id="{identifier}-desc">{escape(description)}</desc>{body}</svg>'
    )


def _value(point: Point) -> float:
    return point[1]


def _edges(line: Line, edge: int) -> list[Point]:
    """Return the lower (0) or upper (1) edge of a line's spread at its points."""
    return _bounded([(step, line.spread[step][edge]) for step, _ in line.points if step in line.spread])


def _bounded(points: Sequence[Point]) -> list[Point]:
    """Return points whose differences are finite, whatever their values are."""
    values = [value for _, value in points]
    if not values or (min(values) >= -_LARGEST and max(values) <= _LARGEST):
        return list(points)
    return [(step, _within_bounds(value)) for step, value in points]


def _within_bounds(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)


def _short(points: Sequence[Point]) -> list[list[float]]:
    return [[step, float(f"{value:.6g}")] for step, value in points]


def tick(value: float) -> str:
    """Return a number as short as the label of an axis must be."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.5g}{name}"
    return f"{value:.6g}"
