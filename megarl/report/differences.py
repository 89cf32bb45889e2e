"""The page of a comparison: how much two sides differ in each metric, seed by seed, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megarl.errors import DataError
from megarl.report.curves import Compared, curve_sections
from megarl.report.data import RunData, read_run
from megarl.report.described import differing_settings
from megarl.report.dots import MOST_ROWS, interval_plot, pair_plot
from megarl.report.markup import escape, folded, identifiers, number, table
from megarl.report.page import SMOOTHING
from megarl.report.shell import COMPARE, shell

Spread = Mapping[int, tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """How a metric differs between A and B.

    Attributes:
        a, b: values by seed.
        mean: mean of the differences b - a.
        interval: interval of that mean; None with one seed.
        verdict: what follows, in words.
    """

    a: Sequence[float]
    b: Sequence[float]
    mean: float
    interval: tuple[float, float] | None
    verdict: str


def differences_page(
    names: tuple[str, str],
    seeds: Sequence[int],
    metrics: Mapping[str, Measured],
    how: str,
    runs: Sequence[Sequence[Path]],
) -> str:
    """Return the page.

    Args:
        names: what A and B are.
        seeds: the seeds.
        metrics: by name, the one that decides first.
        how: how intervals were computed, in words.
        runs: folders of A's and B's runs, by seed.
    """
    sides = [_side(folders) for folders in runs]
    deciding = next(iter(metrics))
    verdict = (
        f'<p class="verdict"><code>{escape(deciding)}</code>: <strong>{escape(metrics[deciding].verdict)}</strong></p>'
    )
    legend = "".join(
        f"<li>{letter}: <code>{escape(name)}</code></li>" for letter, name in zip("AB", names, strict=True)
    )
    introduction = f'{verdict}<ul class="legend">{legend}</ul>'
    sections = [
        ("differences", "Differences", _differences(seeds, metrics, how)),
        ("curves", "Curves", _curves(sides)),
        ("settings", "Settings", _settings(sides, runs)),
    ]
    return shell(COMPARE, f"{names[0]} and {names[1]} compared", introduction, sections)


def _differences(seeds: Sequence[int], metrics: Mapping[str, Measured], how: str) -> str:
    ids = identifiers("difference-", metrics)
    rows = [
        [
            f'<a href="#{ids[name]}"><code>{escape(name)}</code></a>',
            *map(number, (_mean(one.a), _mean(one.b), one.mean)),
            f"{number(one.interval[0])} to {number(one.interval[1])}" if one.interval else "",
            escape(one.verdict),
        ]
        for name, one in metrics.items()
    ]
    header = ["metric", "A", "B", "B - A", "interval", "verdict"]
    figures = "".join(_figure(ids[name], name, one, seeds) for name, one in metrics.items())
    explained = (
        "<p>Hollow dots are the differences of single seeds, the filled dot is their mean, and the line through it is "
        "the interval. If it does not touch 0, the two differ.</p>"
    )
    means = table("Means over the seeds", header, rows, roomy=True)
    return f'<p>{escape(how)}</p>{means}{explained}<div class="figures">{figures}</div>'


def _figure(identifier: str, name: str, one: Measured, seeds: Sequence[int]) -> str:
    differences = [b - a for a, b in zip(one.a, one.b, strict=True)]
    drawn = interval_plot(f"{identifier}-mean", f"Difference of {name}", "B - A", one.mean, one.interval, differences)
    pairs = [(f"seed {seed}", a, b) for seed, a, b in zip(seeds, one.a, one.b, strict=True)]
    both = pair_plot(f"{identifier}-pairs", f"{name} by seed", name, ("A", "B"), pairs)
    fewer = f" The first {MOST_ROWS} of {len(pairs)} seeds are drawn." if len(pairs) > MOST_ROWS else ""
    rows = [[str(seed), *map(number, (a, b, b - a))] for seed, a, b in zip(seeds, one.a, one.b, strict=True)]
    return (
        f'<figure class="curve" id="{identifier}"><figcaption><h3><code>{escape(name)}</code></h3>'
        f"<p>{escape(one.verdict)}</p></figcaption>{drawn}"
        f'<p class="definition">Each seed: A is the filled dot, B the hollow one.{fewer}</p>{both}'
        f"{folded('Values', table(f'<code>{escape(name)}</code> by seed', ['seed', 'A', 'B', 'B - A'], rows))}</figure>"
    )


@dataclass(frozen=True)
class _Side:
    """The runs of a side as one: means over the seeds, and the lowest and highest of them, by metric and step."""

    run: RunData
    spread: Mapping[str, Spread]


def _side(folders: Sequence[Path]) -> _Side | None:
    """Return a side; None if one of its runs has no metrics.csv."""
    try:
        runs = [read_run(folder) for folder in folders]
    except DataError:
        return None
    rows: dict[int, dict[str, float]] = {}
    spread: dict[str, dict[int, tuple[float, float]]] = {}
    for name in runs[0].metrics():
        series = [dict(run.series(name)) for run in runs]
        for step in set.intersection(*map(set, series)):
            values = [points[step] for points in series]
            rows.setdefault(step, {"step": float(step)})[name] = _mean(values)
            if len(values) > 1:
                spread.setdefault(name, {})[step] = (min(values), max(values))
    return _Side(replace(runs[0], rows=[rows[step] for step in sorted(rows)]), spread)


def _curves(sides: Sequence[_Side | None]) -> str:
    there = [side for side in sides if side is not None]
    if len(there) < len(sides) or not any(side.run.rows for side in there):
        return "<p>There are no curves: the runs have no metrics.csv, which logger.csv=true writes.</p>"
    compared = Compared([side.run for side in there], ["A", "B"], spreads={"A": there[0].spread, "B": there[1].spread})
    note = "<p>Lines are means over the seeds; the shade around them reaches from the lowest to the highest seed.</p>"
    return SMOOTHING + (note if any(side.spread for side in there) else "") + curve_sections(compared)


def _settings(sides: Sequence[_Side | None], runs: Sequence[Sequence[Path]]) -> str:
    folders = "".join(
        f"<li>{letter}: <code>{escape(folder)}</code></li>"
        for letter, side in zip("AB", runs, strict=True)
        for folder in side
    )
    there = [side.run for side in sides if side is not None]
    differing = differing_settings(there, ["A", "B"]) if len(there) == len(sides) else ""
    return differing + folded("Folders of the runs", f"<ul>{folders}</ul>")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
