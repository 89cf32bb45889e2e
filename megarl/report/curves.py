"""The curves of a page: the metrics that people look at first in groups, all others folded by their prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megarl.report.data import RunData
from megarl.report.definitions import find_definition
from megarl.report.described import algorithm_of
from megarl.report.draw import Chart, Line, thin
from megarl.report.finding import Finding
from megarl.report.markup import NOTHING, escape, folded, identifiers, in_markdown, number, table

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Score",
        ("eval/score", "rollout/score", "rollout/score_std", "eval/accuracy", "train/accuracy", "eval/margin"),
    ),
    ("Loss", ("train/loss", "eval/loss", "policy/loss", "value/loss", "value/explained_variance")),
    ("KL", ("rollout/kl", "policy/approx_kl", "policy/approx_kl_max", "train/kl", "rollout/kl_coef")),
    ("Entropy and clipping", ("rollout/entropy", "policy/entropy", "policy/clip_fraction", "value/clip_fraction")),
    ("Responses", ("rollout/response_tokens", "eval/response_tokens", "rollout/cut", "rollout/zero_spread_groups")),
    ("Optimization", ("train/grad_norm", "train/critic_grad_norm", "train/lr", "train/optimizer_steps")),
    ("Experts", ("experts/balance_loss", "experts/z_loss", "experts/most_loaded", "experts/unused")),
    (
        "Sampling and training compared",
        ("rollout/logprob_drift", "correction/ess", "correction/kl", "correction/limited"),
    ),
    ("Time and memory", ("perf/step_seconds", "perf/tokens_per_second", "perf/peak_memory_gb")),
)
"""Headings with the metrics under them, in the order of the page."""
_TABLE_POINTS = 40


@dataclass(frozen=True)
class Compared:
    """One run or several on one page.

    Attributes:
        runs: the runs.
        labels: a different name for each.
        findings: what was found in each; None: it was not looked for.
        spreads: of runs that are means of several, the lowest and highest value by metric and step, by label.
        ids: the identifier of each metric's figure.
    """

    runs: Sequence[RunData]
    labels: Sequence[str]
    findings: Sequence[Sequence[Finding]] | None = None
    spreads: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]] = field(default_factory=dict)
    ids: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = sorted({name for run in self.runs for name in run.metrics()})
        object.__setattr__(self, "ids", identifiers("metric-", names))

    @cached_property
    def algorithm(self) -> str:
        """Return the name of the first run's algorithm, for which metrics are defined."""
        return algorithm_of(self.runs[0])

    @property
    def several(self) -> bool:
        """Whether there is more than one run."""
        return len(self.runs) > 1

    def unit(self) -> str:
        """Return what a step is called in all runs."""
        units = {run.unit for run in self.runs}
        return units.pop() if len(units) == 1 else "step or phase"


def curve_sections(compared: Compared) -> str:
    """Return the figures of all metrics, under headings of level 3."""
    shown: set[str] = set()
    parts = []
    for heading, wanted in _with_ranking_metric(compared):
        names = [name for name in wanted if name in compared.ids and name not in shown]
        shown.update(names)
        if names:
            figures = "".join(figure(compared, name) for name in names)
            parts.append(f'<h3>{escape(heading)}</h3><div class="figures">{figures}</div>')
    rest = [name for name in compared.ids if name not in shown]
    folds = identifiers("metrics-", sorted({name.partition("/")[0] for name in rest}))
    parts += ["<h3>Other metrics</h3>"] if rest else []
    for prefix in folds:
        names = [name for name in rest if name.partition("/")[0] == prefix]
        figures = "".join(figure(compared, name) for name in names)
        summary = f"<code>{escape(prefix)}</code>: {len(names)} metric{'s' * (len(names) > 1)}"
        parts.append(folded(summary, f'<div class="figures">{figures}</div>', identifier=folds[prefix]))
    return "".join(parts)


def last_values(compared: Compared) -> str:
    """Return a table of every metric: of one run its course, of several their last values side by side."""
    rows = []
    for name, identifier in compared.ids.items():
        head = f'<a href="#{identifier}"><code>{escape(name)}</code></a>'
        series = [run.series(name) for run in compared.runs]
        if compared.several:
            rows.append([head, *(number(points[-1][1]) if points else NOTHING for points in series)])
        elif points := series[0]:
            values = [value for _, value in points]
            rows.append([head, *map(number, (values[0], values[-1], min(values), max(values)))])
    if compared.several:
        return table("The last value of every metric", ["metric", *map(escape, compared.labels)], rows)
    return table("The course of every metric", ["metric", "first", "last", "lowest", "highest"], rows)


def _with_ranking_metric(compared: Compared) -> Iterable[tuple[str, Sequence[str]]]:
    """Yield the groups; the first has also the metrics that rank checkpoints, and the user's own of evaluations."""
    ranking = [str(run.setting("checkpoint.best.metric", "")) for run in compared.runs]
    own = [name for name in compared.ids if name.startswith("eval/") and "@" not in name and name.count("/") == 1]
    named = {name for _, names in GROUPS for name in names}
    own = [name for name in own if name not in named and not name.endswith("_se")]
    for index, (heading, names) in enumerate(GROUPS):
        yield heading, list(dict.fromkeys([*names, *ranking, *own])) if index == 0 else names


def figure(compared: Compared, name: str) -> str:
    """Return a metric's figure: the curve, values by pointer and keyboard, its definition, and a table."""
    identifier, unit = compared.ids[name], compared.unit()
    series = [run.series(name) for run in compared.runs]
    lines = [
        Line(label if compared.several else name, points, style, compared.spreads.get(label, {}).get(name, {}))
        for style, (label, points) in enumerate(zip(compared.labels, series, strict=True))
        if points
    ]
    caption = f"<figcaption><h4><code>{escape(name)}</code></h4>{_last(compared, lines)}</figcaption>"
    notes = _notes(compared, name)
    if not lines:
        return f'<figure class="curve" id="{identifier}">{caption}{notes}{_definition(compared, name)}</figure>'
    chart = Chart(identifier, f"{name} by {unit}", unit, lines, bands(compared, name))
    reader = (
        f'<input class="reader" type="range" min="0" max="0" value="0" hidden aria-label="{escape(unit)} of '
        f'{escape(name)} to read"><p class="readout" aria-hidden="true"></p>'
    )
    return (
        f'<figure class="curve" id="{identifier}">{caption}{chart.svg()}{reader}{chart.data()}{notes}'
        f"{_definition(compared, name)}{_values(name, unit, lines)}</figure>"
    )


def _last(compared: Compared, lines: Sequence[Line]) -> str:
    """Return the last values of the lines, which are also their legend if there are several runs."""
    if not lines:
        return ""
    if not compared.several:
        step, value = lines[0].points[-1]
        return f'<p class="last"><strong>{number(value)}</strong> at {escape(compared.runs[0].unit)} {number(step)}</p>'
    entries = "".join(
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="line s{line.style % 8}" d="M0 4H24"/>'
        f"</svg>{escape(line.label)} <strong>{number(line.points[-1][1])}</strong></li>"
        for line in lines
    )
    return f'<ul class="legend">{entries}</ul>'


def _notes(compared: Compared, name: str) -> str:
    """Return a sentence about values that cannot be drawn."""
    said = []
    for label, run in zip(compared.labels, compared.runs, strict=True):
        steps = run.not_finite(name)
        if steps:
            of = f" of {escape(label)}" if compared.several else ""
            count = "1 value is" if len(steps) == 1 else f"{len(steps):,} values are"
            said.append(f"{count} not finite{of}, first at {escape(run.unit)} {number(steps[0])}.")
    return f'<p class="caveat">{" ".join(said)}</p>' if said else ""


def _definition(compared: Compared, name: str) -> str:
    found = find_definition(name, compared.algorithm)
    if found is None:
        return '<p class="definition">docs/metrics.md does not define this metric: it is logged by code of yours.</p>'
    unit = "" if found.unit in (NOTHING, "") else f" <em>Unit: {escape(found.unit)}.</em>"
    formula = f' <span class="formula">{in_markdown(found.formula)}</span>.' if found.formula else ""
    advice = "".join(
        f"<p><strong>{name}:</strong> {in_markdown(said)}</p>"
        for name, said in (("Normal", found.normal), ("If not", found.remedy))
        if said
    )
    return f'<p class="definition">{in_markdown(found.text)}{unit}{formula}</p>' + (
        f'<div class="definition">{folded("What is normal, and what to do if not", advice)}</div>' if advice else ""
    )


def bands(compared: Compared, name: str) -> list[tuple[int, int]]:
    """Return the spans of steps of the findings that a metric shows."""
    found = [finding for findings in compared.findings or () for finding in findings]
    return [finding.steps for finding in found if name in finding.metrics and finding.steps is not None]


def _values(name: str, unit: str, lines: Sequence[Line]) -> str:
    """Return the folded table of a figure."""
    longest = max(len(line.points) for line in lines)
    kept: list[Mapping[int, float]] = [dict(thin(line.points, max(_TABLE_POINTS // len(lines), 8))) for line in lines]
    steps = sorted({step for points in kept for step in points})
    whole: list[Mapping[int, float]] = [dict(line.points) for line in lines]
    rows = [[number(step), *(_cell(points, step) for points in whole)] for step in steps]
    header = [escape(unit), *(escape(line.label) for line in lines)]
    some = f": {len(steps)} of {longest:,} values, peaks among them" if len(steps) < longest else ""
    caption = f"Values of <code>{escape(name)}</code>{some}"
    return folded("Values", table(caption, header, rows))


def _cell(points: Mapping[int, float], step: int) -> str:
    return number(points[step]) if step in points else NOTHING
