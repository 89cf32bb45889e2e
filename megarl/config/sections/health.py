"""Which findings about a run end it."""

# ruff: noqa: RUF009 - `leaf` returns dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import finding_name
from megarl.config.leaf import Section, leaf

HEALTH = "Findings about the run that end it (null: none do)."


@dataclass
class HealthConfig(Section):
    """Which findings about a run end it."""

    stop_on: list[str] = leaf(
        [],
        "Names of findings (docs/findings.md), as in [score_collapsed,kl_runaway]: as soon as the metrics of the run "
        "show one of them, the run ends with exit code 3 and one line; checkpoints stay.",
        form=finding_name,
    )
