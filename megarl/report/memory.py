"""The planned memory of a rank: a drawing by phase and purpose, and a table by role. The plan's page and the report of
a run show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.report.bars import Bar, legend, stacked_bars
from megarl.report.markup import escape, folded, number, table

DECIMAL = ((1e9, "GB"), (1e6, "MB"))
BINARY = ((2.0**30, "GiB"), (2.0**20, "MiB"))
"""Units: their size in bytes and their names, the larger first."""
_LARGE = 0.1  # of a unit; what is smaller has the next one
COLOURS = ("weights", "gradients", "optimizer", "activations", "logits", "cache")
"""What memory is for, in the order of the colours."""
Unit = tuple[float, str]


def unit_for(size: float, units: Sequence[Unit] = DECIMAL) -> Unit:
    """Return the largest unit in which a number of bytes is not a tiny fraction."""
    return next((unit for unit in units if size >= _LARGE * unit[0]), units[-1])


def in_words(size: float) -> str:
    """Return a number of bytes with its unit."""
    unit = unit_for(size)
    return f"{number(size / unit[0])} {unit[1]}"


def memory_figure(
    identifier: str,
    caption: str,
    rank: Mapping[str, Any],
    marks: Mapping[str, float],
    units: Sequence[Unit] = DECIMAL,
) -> str:
    """Return the figure of one rank.

    Args:
        identifier: identifier of the figure.
        caption: what it shows, as text.
        rank: the rank as in the plan's JSON.
        marks: bytes by name to draw as lines, such as what a GPU has.
        units: of which one is chosen for the drawing and the table.
    """
    size, name = unit = unit_for(max(peak_of(rank)[1], *marks.values(), 0.0), units)
    bars = [
        Bar(phase, {part: parts[part] / size for part in COLOURS if part in parts})
        for phase, parts in by_phase(rank).items()
    ]
    lines = {about: value / size for about, value in marks.items()}
    drawn = stacked_bars(identifier, caption, name, bars, COLOURS, lines)
    there = {part for bar in bars for part, value in bar.parts.items() if value}
    return (
        f'<figure class="curve sole" id="{identifier}"><figcaption><h4>{escape(caption)}</h4>'
        f"{legend(COLOURS, list(marks), there)}</figcaption>{drawn}{_by_role(caption, rank, unit)}</figure>"
    )


def by_phase(rank: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the bytes on the device by phase and by what they are for, over all roles."""
    return {
        phase: {part: float(sum(role.get(part, 0) for role in content["roles"].values())) for part in COLOURS}
        for phase, content in rank["phases"].items()
    }


def peak_of(rank: Mapping[str, Any]) -> tuple[str, float]:
    """Return the phase that needs the most memory on the device, and its bytes."""
    sizes = {phase: float(sum(parts.values())) for phase, parts in by_phase(rank).items()}
    return max(sizes.items(), key=lambda item: item[1])


def _by_role(caption: str, rank: Mapping[str, Any], unit: Unit) -> str:
    """Return the folded table of a figure."""
    phases = by_phase(rank)
    names = [part for part in COLOURS if any(parts[part] for parts in phases.values())]
    host = any("host" in role for content in rank["phases"].values() for role in content["roles"].values())
    rows = []
    for phase, content in rank["phases"].items():
        for role, parts in content["roles"].items():
            if any(parts.values()):
                sizes = [parts.get(part, 0) for part in names]
                sizes += [sum(sizes), *([parts.get("host", 0)] if host else [])]
                cells = [number(size / unit[0]) if size else "" for size in sizes]
                rows.append([escape(phase), escape(role), *cells])
    header = ["phase", "role", *names, "total", *(["host memory"] if host else [])]
    return folded("Values by role", table(f"{escape(caption)}, in {unit[1]}", header, rows, roomy=True))
