"""The keys of `megarl sweep`, written sweep.KEY. All other keys on its command line are those of the runs."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import leaf

KINDS = ("grid", "random", "bayesian", "hyperband")
BACKENDS = ("local", "ray")


@dataclass
class SweepConfig:
    """How a sweep searches, and how it runs its trials."""

    dir: str | None = leaf(
        None,
        "Folder of the sweep, in which a sweep that was interrupted continues (null: runs/sweep-ALGORITHM).",
    )
    file: str | None = leaf(
        None,
        "YAML file with keys of this list, `search` (distributions by key) and `settings` (keys of the runs). The "
        "command line replaces what is in it.",
    )
    kind: str = leaf(
        "random",
        "How the next trial is chosen. grid: every combination; random: independently; bayesian: where a Gaussian "
        "process expects the largest improvement; hyperband: many trials with a small budget, of which the best go on.",
        KINDS,
    )
    metric: str | None = leaf(
        None, "Metric that decides, as in summary.json of a run: eval/loss or eval/score, for example."
    )
    mode: str = leaf(
        "auto",
        "Whether the metric should be small or large (auto: small for losses, perplexity, KL and the like).",
        ("auto", "min", "max"),
    )
    value: str = leaf(
        "last",
        "Which value of the metric counts: the last of the run, its best, or the mean of the last five.",
        ("last", "best", "last5"),
    )
    trials: int | None = leaf(
        None,
        "Number of trials; of the first bracket in hyperband (null: 20, 27 in hyperband, or the whole grid).",
        at_least=1,
        at_most=100_000,
    )
    at_once: int = leaf(1, "Number of trials that run at the same time.", at_least=1, at_most=1024)
    search_seed: int = leaf(1, "Seed of what is tried. The seed of the runs is the key seed.", at_least=0)
    grid_points: int = leaf(3, "Number of values of a range in a grid.", at_least=1, at_most=1000)
    budget_key: str | None = leaf(
        None,
        "Key that hyperband increases from rung to rung (null: trainer.max_phases, or trainer.max_steps in algorithms "
        "without phases).",
    )
    min_budget: int | None = leaf(None, "Smallest budget of hyperband (null: the largest divided by nine).", at_least=1)
    max_budget: int | None = leaf(None, "Largest budget of hyperband (null: the value that the key has).", at_least=1)
    eta: int = leaf(3, "In hyperband, one trial in this many goes on, with this many times the budget.", at_least=2)
    brackets: int = leaf(
        1,
        "Number of brackets of hyperband. Each starts with a larger budget and fewer trials than the one before; one "
        "is successive halving.",
        at_least=1,
    )
    cpus: int | None = leaf(
        None, "Number of CPU threads per trial (null: the machine's cores divided by sweep.at_once).", at_least=1
    )
    gpus: int | None = leaf(
        None,
        "Number of GPUs per trial, of those that CUDA_VISIBLE_DEVICES lists (null: every trial sees all of them).",
        at_least=0,
    )
    retry_failed: bool = leaf(False, "When a sweep is resumed, run trials that failed again.")
    backend: str = leaf("local", "What starts trials: processes on this machine, or Ray, if it is installed.", BACKENDS)
    launcher: str | None = leaf(
        None,
        "Command that runs a trial instead of a process on this machine, and ends with its exit code. The trial's "
        "settings follow it: 'sbatch --wait launchers/ppo.sh' (null: python -m megarl.train_ALGORITHM).",
    )
