"""What scores responses."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.leaf import A_YEAR_S, Section, leaf

SCORER_START_S = 120.0
"""Seconds that the scoring process may take to start and to load its function."""
ON_ERROR = ("error", "drop")


@dataclass
class RewardConfig(Section):
    """The reward function, which runs in its own process."""

    fn: str | None = leaf(
        None,
        "Reward function, as package.module:function or file.py:function; several as a weighted sum, "
        "'0.7*a:f + 0.3*b:g'.",
    )
    options: dict[str, Any] = leaf({}, "Additional keyword arguments of the reward function.")
    timeout: float = leaf(
        60.0, "Seconds that one call may take before its process is killed.", above=0, at_most=A_YEAR_S
    )
    retries: int = leaf(1, "Number of times that a failed call is repeated.", at_least=0, at_most=1000)
    on_error: str = leaf(
        "error",
        "What happens to samples that have no score after the last try: the run ends with an error, or they are left "
        "out and counted.",
        ON_ERROR,
    )
    batch_size: int | None = leaf(
        None, "Maximum number of samples per call (null: all in one call).", at_least=1, at_most=2**24
    )
    devices: str = leaf("", "CUDA_VISIBLE_DEVICES of the scoring process (empty: it sees no GPU).")


@dataclass
class MetricConfig(Section):
    """What evaluations measure besides the score."""

    fn: str | None = leaf(
        None,
        "Function that is called in evaluations as the reward function is, with the same time limit; the mean of what "
        "it returns is logged under its name.",
    )
