"""When a metric of which more is better has collapsed. Findings use the rule, and the callback that warns at once."""

from __future__ import annotations

from dataclasses import dataclass

SCORE, SPREAD = "rollout/score", "rollout/score_std"
PATIENCE = 3  # number of readings in a row that are down in a collapse
LOST = 0.5  # share of the gain since the first reading, or of a best above 0
EVALUATION_NOISE = 0.05  # noise of an evaluation, relative to the larger of best and first
SCORE_NOISE = 0.5  # noise of a phase's mean score, relative to the scores' standard deviation


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

    def add(self, step: int, value: float, noise: float | None = None) -> None:
        """Add a reading. `noise` is how much it may be off by chance; None: that of an evaluation."""
        if noise is None:
            noise = EVALUATION_NOISE * max(abs(self.best or 0.0), abs(self.first or 0.0))
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
