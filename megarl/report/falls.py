"""When a metric of which more is better has collapsed. Findings use the rule, and the callback that warns at once."""

from __future__ import annotations

from dataclasses import dataclass

SCORE, SPREAD = "rollout/score", "rollout/score_std"
PATIENCE = 3  # number of readings in a row that are down in a collapse
LOST = 0.5  # share of the gain since the first reading, or of a best above 0
EVALUATION_NOISE = 0.05  # noise of an evaluation, relative to the larger of best and first
ERRORS = 3.0  # noise of an evaluation in standard errors, where one is known
SCORE_NOISE = 0.5  # noise of a phase's mean score, relative to the scores' standard deviation


def standard_error(value: float, score: float | None, score_error: float | None) -> float:
    """Return the standard error of an evaluated metric, from that of the mean score of the same responses: relative to
    their values it is about the same. 0 where it is not known."""
    if score is None or score_error is None or score_error <= 0:
        return 0.0
    if value == score:
        return score_error
    return score_error * abs(value / score) if abs(score) > score_error else 0.0


@dataclass
class Fall:
    """Tracks a metric of which more is better, to detect a collapse.

    A reading is down when the metric lost more than half of its gain since the first reading, or more than half of a
    best that is above 0, and lost more than noise.
    """

    first: float | None = None
    best: float | None = None
    best_step: int = 0
    best_noise: float = 0.0
    last: float = 0.0
    down: int = 0  # number of readings in a row that are down
    since: int = 0  # step of the first of these

    def add(self, step: int, value: float, noise: float | None = None, error: float = 0.0) -> None:
        """Add a reading. `noise` is how much it may be off by chance; None: that of an evaluation, whose standard error
        is `error` if it is known."""
        if noise is None:
            noise = max(EVALUATION_NOISE * max(abs(self.best or 0.0), abs(self.first or 0.0)), ERRORS * error)
        self.last = value
        if self.first is None:
            self.first = value
        if self.best is None or value > self.best:
            self.best, self.best_step, self.best_noise = value, step, noise
        if not self._is_down(self.first, self.best, max(noise, self.best_noise)):
            self.down = 0
            return
        self.since = self.since if self.down else step
        self.down += 1

    @property
    def collapsed(self) -> bool:
        """Whether enough readings in a row are down."""
        return self.down >= PATIENCE

    def _is_down(self, first: float, best: float, noise: float) -> bool:
        lost, gained = best - self.last, best - first
        most_of_gain = gained > noise and lost > LOST * gained
        most_of_best = best > 0 and lost > LOST * best
        return lost > noise and (most_of_gain or most_of_best)
