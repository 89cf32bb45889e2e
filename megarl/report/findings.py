"""What a run's data say about it, in words: problems, warnings and what to try, the worst first."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from megarl.config.findings import FINDINGS
from megarl.report import of_policies, of_scores, of_training
from megarl.report.data import RunData
from megarl.report.finding import SEVERITIES, Finding
from megarl.report.remedies import first_remedies

Finder = Callable[[RunData], Finding | None]

FINDERS: dict[str, Finder] = {
    finder.__name__: finder
    for finder in (
        of_scores.score_collapsed,
        of_policies.kl_runaway,
        of_training.loss_diverges,
        of_training.gradients_explode,
        of_training.gradients_dead,
        of_policies.entropy_collapsed,
        of_scores.no_learning,
        of_training.learning_rate_ended,
        of_scores.reward_hacking,
        of_scores.score_follows_length,
        of_policies.groups_without_spread,
        of_policies.value_explains_nothing,
        of_policies.clipping_always,
        of_policies.clipping_never,
        of_policies.responses_cut,
        of_policies.logprob_drift,
        of_training.reward_calls_failed,
        of_training.evaluation_gap,
        of_training.data_repeated,
        of_training.waiting_for_rewards,
    )
}
"""Every finding by its name, in the order in which equally severe ones are listed."""

FILE = "findings.json"
"""Name of the file with a run's findings in its folder."""


def find(data: RunData, names: Collection[str] = FINDINGS) -> list[Finding]:
    """Return what is found in a run, problems first. `names` are the findings to look for."""
    found = [finding for name, finder in FINDERS.items() if name in names and (finding := finder(data)) is not None]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def line(finding: Finding) -> str:
    """Return a finding as one line for the terminal, with the first remedies."""
    tried = first_remedies(finding.remedy)
    return f"{finding.severity} {finding.name}: {finding.title}. {finding.evidence} Try: {tried}."


def from_plain(plain: dict[str, Any]) -> Finding:
    """Return a finding of findings.json. Raise TypeError or ValueError if it is none."""
    if plain.get("severity") not in SEVERITIES:
        raise ValueError("a finding has a severity")
    metrics, steps = tuple(plain.pop("metrics", ())), plain.pop("steps", None)
    return Finding(**plain, metrics=metrics, steps=None if steps is None else (int(steps[0]), int(steps[1])))


def as_plain(findings: list[Finding]) -> list[dict[str, Any]]:
    """Return findings in the form of findings.json."""
    return [{**asdict(one), "metrics": list(one.metrics), "steps": one.steps and list(one.steps)} for one in findings]
