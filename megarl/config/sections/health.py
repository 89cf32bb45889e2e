"""What is checked during a run, and what ends it."""

# ruff: noqa: RUF009 - `leaf` returns dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import finding_name
from megarl.config.leaf import Section, leaf

HEALTH = "What is checked during the run, and what ends it; null means the defaults."


@dataclass
class HealthConfig(Section):
    """What is checked during a run, and what ends it."""

    stop_on: list[str] = leaf(
        [],
        "Names of findings (docs/findings.md), as in [score_collapsed,kl_runaway]: as soon as the metrics of the run "
        "show one of them, the run ends with exit code 3 and one line; checkpoints stay.",
        form=finding_name,
    )
    peak_tflops: float | None = leaf(
        None,
        "Peak TFLOP/s of one device, from which the model FLOPs utilisation is computed and logged (null: not logged).",
        above=0,
    )


@dataclass
class PPOHealthConfig(HealthConfig):
    """What is checked during a run of PPO, and what ends it."""

    invariants: str = leaf(
        "strict",
        "What happens when a check during training fails: the run ends with an error, or one warning per check is "
        "logged. Checked: the policy equals the reference before training, generated and recomputed log-probs agree "
        "(not with ppo.correction), the first minibatch has ratio 1, each epoch uses every response token once, every "
        "trained tensor gets a gradient, copies of the weights (rollout.engine.layout, ppo.action_mask) equal them.",
        ("strict", "warn"),
    )
