"""Bars as SVG: sums made of parts, and what several lanes do at which time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megarl.report.draw import STYLES, WIDTH, svg, tick, ticks
from megarl.report.markup import escape, number

_MARGIN = 6
_BAR, _ROW = 16, 36
_LANE, _LEFT, _WIDE = 24, 62, 720
_LETTER = 6.2  # width of a digit of a tick
_THIN = 5  # below this width a line around a bar would hide it


@dataclass(frozen=True)
class Bar:
    """A sum of parts.

    Attributes:
        label: its name.
        parts: its parts by name, none of them negative.
    """

    label: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(self.parts.values()))


def stacked_bars(
    identifier: str,
    title: str,
    unit: str,
    bars: Sequence[Bar],
    colours: Sequence[str],
    marks: Mapping[str, float] | None = None,
) -> str:
    """Return bars one below the other. A part of a name has the same colour in all of them.

    Args:
        identifier: prefix of the identifiers inside it.
        title: what it shows, as text.
        unit: of all values.
        bars: at least one.
        colours: names of parts in the order of their colours.
        marks: values by name to draw as lines through all bars.
    """
    marks = marks or {}
    right = max(*(bar.total for bar in bars), *marks.values(), 1e-12)
    bottom = _ROW * len(bars) + 4
    scale = (WIDTH - 2 * _MARGIN) / right
    body = [_axis(right, scale, bottom, unit)]
    for index, bar in enumerate(bars):
        top, x = index * _ROW, float(_MARGIN)
        label = f"{bar.label}: {number(bar.total)} {unit}"
        body.append(f'<text class="tick" x="{_MARGIN}" y="{top + 13}">{escape(label)}</text>')
        for name, value in bar.parts.items():
            if value > 0:
                body.append(
                    f'<rect class="part f{colours.index(name) % STYLES}" x="{x:.1f}" y="{top + 17}" '
                    f'width="{value * scale:.2f}" height="{_BAR}"><title>{escape(bar.label)}, {escape(name)}: '
                    f"{number(value)} {escape(unit)}</title></rect>"
                )
                x += value * scale
    body += [
        f'<path class="limit" d="M{_MARGIN + value * scale:.1f} 0V{bottom}"><title>{escape(name)}: {number(value)} '
        f"{escape(unit)}</title></path>"
        for name, value in marks.items()
    ]
    said = [f"{bar.label}: {_told(bar, unit)}." for bar in bars]
    said += [f"{name}: {number(value)} {unit}." for name, value in marks.items()]
    return svg(identifier, title, " ".join(said), "".join(body), (WIDTH, bottom + 32))


def legend(colours: Sequence[str], marks: Sequence[str] = (), there: Collection[str] | None = None) -> str:
    """Return which colour is which part, and what the lines are; `there` has the names that are drawn (None: all)."""
    entries = [
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><rect class="part f{index % STYLES}" width="24" '
        f'height="8"/></svg>{escape(name)}</li>'
        for index, name in enumerate(colours)
        if there is None or name in there
    ]
    entries += [
        '<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="limit" d="M0 4H24"/></svg>'
        f"{escape(name)}</li>"
        for name in marks
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


@dataclass(frozen=True)
class Span:
    """What a lane does for a time.

    Attributes:
        start, end: from when to when.
        style: number of its colour.
        text: short text to write into it where there is room.
        about: the same in words.
        low: whether it is drawn less high, so that it can be told from others without colours.
    """

    start: float
    end: float
    style: int
    text: str
    about: str
    low: bool = False


def gantt(
    identifier: str, title: str, description: str, lanes: Sequence[tuple[str, Sequence[Span]]], scale: tuple[float, str]
) -> str:
    """Return what each lane does at which time. It is wide, and scrolls within itself on a narrow screen.

    Args:
        identifier: prefix of the identifiers inside it.
        title, description: text.
        lanes: their names and spans.
        scale: what the times are multiplied with for the axis, and the unit of that.
    """
    end = max((span.end for _, spans in lanes for span in spans), default=0.0) or 1.0
    across = (_WIDE - _LEFT - 8) / end
    bottom = len(lanes) * _LANE + 2
    body = [_axis(end * scale[0], across / scale[0], bottom, scale[1], _LEFT, _WIDE)]
    for index, (label, spans) in enumerate(lanes):
        top = index * _LANE + 2
        body.append(f'<text class="tick" x="{_LEFT - 6}" y="{top + 14}" text-anchor="end">{escape(label)}</text>')
        for span in spans:
            x, width = _LEFT + span.start * across, (span.end - span.start) * across
            inset, kind = 3 if span.low else 0, "part thin" if width < _THIN else "part"
            body.append(
                f'<rect class="{kind} f{span.style % STYLES}" x="{x:.2f}" y="{top + inset}" width="{width:.2f}" '
                f'height="{_LANE - 4 - 2 * inset}"><title>{escape(span.about)}</title></rect>'
            )
            if width > len(span.text) * _LETTER + 3:
                body.append(
                    f'<text class="inside" x="{x + width / 2:.1f}" y="{top + 14}" text-anchor="middle">'
                    f"{escape(span.text)}</text>"
                )
    drawn = svg(identifier, title, description, "".join(body), (_WIDE, bottom + 32))
    return f'<div class="wide gantt" data-label="{escape(title)}">{drawn}</div>'


def _axis(end: float, scale: float, bottom: int, unit: str, left: int = _MARGIN, width: int = WIDTH) -> str:
    """Return an axis from 0 to a value below what is drawn, with lines through it."""
    parts = []
    for value in ticks(0.0, end, 6):
        x = left + value * scale
        anchor = "start" if value == 0 else "end" if x > width - 14 else "middle"
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 13}" text-anchor="{anchor}">{tick(value)}</text>')
    parts.append(
        f'<text class="tick" x="{(left + width) / 2}" y="{bottom + 27}" text-anchor="middle">{escape(unit)}</text>'
    )
    return "".join(parts)


def _told(bar: Bar, unit: str) -> str:
    parts = ", ".join(f"{name} {number(value)}" for name, value in bar.parts.items() if value > 0)
    return f"{number(bar.total)} {unit}" + (f" ({parts})" if parts else "")
