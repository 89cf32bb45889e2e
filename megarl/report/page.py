"""The page of one run or several: its sections. What all pages have is in shell.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megarl.report.curves import Compared, curve_sections, last_values
from megarl.report.data import RunData
from megarl.report.described import configuration, described, differing_settings, side_by_side, status, times
from megarl.report.finding import SEVERITIES, Finding
from megarl.report.markup import escape, folded, section
from megarl.report.predicted import predicted
from megarl.report.responses import distribution, samples
from megarl.report.scores import read_scores
from megarl.report.shell import ALONE, REPORT, Surroundings, head_of, shell
from megarl.report.tokens import EXPLAINED, tokens

SMOOTHING = (
    '<div class="control" hidden><label for="smoothing">Smoothing</label>'
    '<input id="smoothing" type="range" min="0" max="0.95" step="0.05" value="0">'
    '<output for="smoothing">none</output></div>'
    '<p class="hint" hidden>Point at a curve, or move the slider below it, to read its values.</p>'
)
"""What stands above curves: the script shows it."""


def page(
    runs: Sequence[RunData],
    findings: Sequence[Sequence[Finding]] | None = None,
    around: Surroundings = ALONE,
    command: str = REPORT,
) -> str:
    """Return the page of one run, or of several that it compares.

    Args:
        runs: at least one.
        findings: what was found in each run; None: it was not looked for, and the page does not mention it.
        around: what the page has beside its sections.
        command: the command that makes it.
    """
    compared = Compared(runs, labels(runs), findings)
    sections = [(name, heading, content(compared)) for name, (heading, content) in SECTIONS.items()]
    return shell(command, _title(compared), _states(compared), sections, around)


def head(compared: Compared) -> str:
    """Return the title of the page with the status of each run."""
    return head_of(_title(compared), _states(compared))


def _states(compared: Compared) -> str:
    states = "; ".join(
        f"{escape(label)}: {status(run)}" if compared.several else status(run)
        for label, run in zip(compared.labels, compared.runs, strict=True)
    )
    return f"<p>{states}</p>"


def section_of(compared: Compared, identifier: str) -> str:
    """Return a section of `SECTIONS`; empty if it has no content."""
    heading, content_of = SECTIONS[identifier]
    content = content_of(compared)
    return section(identifier, heading, content) if content else ""


def labels(runs: Sequence[RunData]) -> list[str]:
    """Return a different name for each run: the end of its path, with as many folders as that needs."""
    parts = [run.path.absolute().parts for run in runs]
    for folders in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-folders:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.path) for run in runs]


def _title(compared: Compared) -> str:
    return f"{len(compared.runs)} runs compared" if compared.several else compared.labels[0]


def _findings(compared: Compared) -> str:
    if compared.findings is None:
        return ""
    if not any(compared.findings):
        return "<p>Nothing was found that needs attention.</p>"
    parts = []
    for label, findings in zip(compared.labels, compared.findings, strict=True):
        ordered = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
        parts += [_finding(compared, label if compared.several else "", finding) for finding in ordered]
    return f'<ol class="findings">{"".join(parts)}</ol>'


def _finding(compared: Compared, label: str, finding: Finding) -> str:
    links = [
        f'<a href="#{compared.ids[name]}"><code>{escape(name)}</code></a>'
        for name in finding.metrics
        if name in compared.ids
    ]
    shown = f"<p>{'The curve' if len(links) == 1 else 'The curves'}: {', '.join(links)}</p>" if links else ""
    of = f" ({escape(label)})" if label else ""
    return (
        f'<li class="finding {finding.severity}"><h3><span class="severity">{finding.severity.capitalize()}</span> '
        f"{escape(finding.title)}{of}</h3><p>{escape(finding.evidence)}</p>"
        f"<p><strong>Cause:</strong> {escape(finding.cause)}</p>"
        f"<p><strong>What to try:</strong> {escape(finding.remedy)}</p>{shown}</li>"
    )


def _ran(compared: Compared) -> str:
    runs = compared.runs
    if compared.several:
        return side_by_side(runs, compared.labels) + _each(compared, [times(run) for run in runs])
    return described(runs[0]) + times(runs[0])


def _predicted(compared: Compared) -> str:
    return _each(compared, [predicted(run, index) for index, run in enumerate(compared.runs)])


def _curves(compared: Compared) -> str:
    if not compared.ids:
        return "<p>Nothing is logged yet.</p>"
    return SMOOTHING + curve_sections(compared)


def _values(compared: Compared) -> str:
    if not compared.ids:
        return ""
    return last_values(compared) if compared.several else folded("All metrics", last_values(compared))


def _scores(compared: Compared) -> str:
    return _each(
        compared, [distribution(read_scores(run), f"scores-{index}") for index, run in enumerate(compared.runs)]
    )


def _samples(compared: Compared) -> str:
    return _each(compared, [samples(run, 4 if compared.several else 3) for run in compared.runs])


def _tokens(compared: Compared) -> str:
    content = _each(compared, [tokens(run, 4 if compared.several else 3) for run in compared.runs])
    return EXPLAINED + content if content else ""


def _configuration(compared: Compared) -> str:
    if not compared.several:
        return configuration(compared.runs[0])
    return differing_settings(compared.runs, compared.labels) + "".join(
        folded(f"Configuration of {escape(label)}", configuration(run))
        for label, run in zip(compared.labels, compared.runs, strict=True)
    )


def _each(compared: Compared, contents: Sequence[str]) -> str:
    """Return the contents of all runs that have any, each under the run's name if there are several."""
    if not compared.several:
        return contents[0]
    return "".join(
        f"<h3>{escape(label)}</h3>{content}"
        for label, content in zip(compared.labels, contents, strict=True)
        if content
    )


SECTIONS: dict[str, tuple[str, Callable[[Compared], str]]] = {
    "findings": ("Findings", _findings),
    "run": ("What ran", _ran),
    "predicted": ("Predicted and measured", _predicted),
    "curves": ("Curves", _curves),
    "values": ("Values", _values),
    "scores": ("Scores of the responses", _scores),
    "samples": ("Samples before and after", _samples),
    "tokens": ("Tokens", _tokens),
    "configuration": ("Configuration", _configuration),
}
"""The sections by identifier, in the order of the page: heading, and what makes the content; empty: no section."""
