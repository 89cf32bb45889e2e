"""The progress of a run and its latest metrics, as displays show them."""

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.callbacks.trainer_state import EVALUATION
from megarl.rewards.scores import total

SCORE, LOSS = "rollout/score", "train/loss"
HEADLINES = (SCORE, LOSS)
"""The metric that says how a run goes: the score, or the loss of an algorithm without one."""
ENTROPY, PEAK_MEMORY = "rollout/entropy", "perf/peak_memory_gb"
TREND = 40
"""Number of values of the headline that are kept."""
_STANDARD_ERROR = re.compile(r"_se(@|$)")  # in the name of a metric; values of a sweep follow the @


def count(value: float) -> str:
    """Format a number in short: 1234.5 as 1.23k."""
    for letter, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds as H:MM:SS."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


FORMATS: dict[str, Callable[[float], str]] = {
    SCORE: lambda value: f"score {value:.4f}",
    "rollout/score_before_replacing": lambda value: f"before replacing {value:.4f}",
    "rollout/kl": lambda value: f"kl {value:.4f}",
    ENTROPY: lambda value: f"entropy {value:.4f}",
    LOSS: lambda value: f"loss {value:.4f}",
    "train/grad_norm": lambda value: f"grad norm {value:.3f}",
    "train/lr": lambda value: f"lr {value:.2e}",
    "perf/tokens_per_second": lambda value: f"{count(value)} tokens/s",
}
"""How the metrics that displays show are written, in their order."""


@dataclass(frozen=True)
class Shown:
    """A prompt and a response of the model."""

    origin: str
    prompt: str
    response: str
    score: float | None = None

    @classmethod
    def of(cls, origin: str, row: Mapping[str, Any] | None) -> "Shown | None":
        """Return what a row with a prompt, a response and perhaps a score holds; None for other rows."""
        if row is None or not {"prompt", "response"} <= row.keys():
            return None
        score = row.get("score")
        return cls(origin, str(row["prompt"]), str(row["response"]), None if score is None else total(score))


@dataclass
class RunProgress:
    """The progress of a run, and its latest metrics.

    Attributes:
        step: number of completed steps.
        total: number of steps of the whole run; None without a limit.
        metrics: metrics of the last step that was read, by logged name.
        evaluation: metrics of the last evaluation, by logged name.
        eta_s: remaining seconds.
        took_s: seconds of this process, once it has ended.
        unit: what a step is called.
        section: the section of a step that runs now; "" between sections.
        seconds: seconds of each section in the last step.
        trend: last values of the headline.
        memory_gb: memory of this process in 10^9 bytes, on its GPU if it uses one.
        sample: a response of the last step or evaluation.
    """

    step: int
    total: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    eta_s: float | None = None
    took_s: float | None = None
    unit: str = "step"
    section: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    trend: deque[float] = field(default_factory=lambda: deque(maxlen=TREND))
    memory_gb: float | None = None
    sample: Shown | None = None

    @property
    def steps(self) -> str:
        """The step and the total, as in `step 3/10`."""
        return f"{self.unit} {self.step}" if self.total is None else f"{self.unit} {self.step}/{self.total}"

    @property
    def headline(self) -> str | None:
        """Name of the metric that says how the run goes; None before the first step."""
        return next((name for name in HEADLINES if name in self.metrics), None)

    def details(self) -> str:
        """Return the metrics and the remaining time as one plain line."""
        parts = [show(self.metrics[name]) for name, show in FORMATS.items() if name in self.metrics and name != ENTROPY]
        if self.eta_s is not None:
            parts.append(f"eta {duration(self.eta_s)}")
        return "  ".join(parts)

    def evaluated(self) -> list[str]:
        """Return the metrics of the last evaluation with their values, without their standard errors."""
        shown = {name: value for name, value in self.evaluation.items() if not _STANDARD_ERROR.search(name)}
        return [f"{name.removeprefix(EVALUATION)} {value:.4g}" for name, value in shown.items()]
