"""What a finding is: something about a run that a person should know, with its evidence and what to try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
"""From the worst on."""


@dataclass(frozen=True)
class Finding:
    """A finding.

    Attributes:
        name: its name in findings.json and in health.stop_on, such as score_collapsed.
        severity: problem: the result is lost or in doubt; warning: it will be, or time is wasted; note: worth knowing.
        title: what happened, in one sentence without numbers.
        evidence: the numbers that show it, in one sentence.
        cause: what usually causes it, in one or two sentences.
        remedy: what to try, with keys and values.
        metrics: names of the metrics that show it, the most telling first.
        steps: first and last step at which it holds; None: the whole run.
    """

    name: str
    severity: Severity
    title: str
    evidence: str
    cause: str
    remedy: str
    metrics: tuple[str, ...] = ()
    steps: tuple[int, int] | None = None
