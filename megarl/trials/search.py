"""Which trial of a sweep comes next. A search decides from the trials so far, so a resumed sweep continues as if it had
not been interrupted."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megarl.trials.gaussian import suggest
from megarl.trials.spaces import Space, grid, points_of, settings_at


@dataclass
class Trial:
    """One setting of the keys that a sweep varies.

    Attributes:
        number: its number in the sweep, from 0.
        settings: its values by key.
        results: the metric by budget (0 in searches without budgets); None where the run failed or has no such metric.
        running: budget that it runs with now; None if it does not run.
    """

    number: int
    settings: dict[str, str]
    results: dict[int, float | None] = field(default_factory=dict)
    running: int | None = None


@dataclass(frozen=True)
class Step:
    """What to run next: a trial, new or known, with a budget (0: none)."""

    number: int
    settings: dict[str, str]
    budget: int = 0


class Search(ABC):
    """Chooses the next step. `next` returns None while it must wait for results, and when it is done."""

    def __init__(self, spaces: Sequence[Space], trials: int, seed: int = 1, *, lower_is_better: bool = False) -> None:
        self.spaces, self.trials, self.seed, self.lower_is_better = list(spaces), trials, seed, lower_is_better

    @abstractmethod
    def next(self, trials: Sequence[Trial]) -> Step | None:
        """Return the next step after trials that are sorted by number."""

    def random_settings(self, number: int) -> dict[str, str]:
        """Return the settings of a random trial, which depend on the seed and the number alone."""
        draw = random.Random(f"{self.seed} {number}")
        return settings_at(self.spaces, [draw.random() for _ in self.spaces])

    def ranked(self, results: Sequence[tuple[float | None, int]]) -> list[int]:
        """Return the numbers of (result, number), the best first; failed ones are last, and ties by number."""

        def order(one: tuple[float | None, int]) -> tuple[bool, float, int]:
            value, number = one
            if value is None or not math.isfinite(value):
                return True, 0.0, number
            return False, value if self.lower_is_better else -value, number

        return [number for _, number in sorted(results, key=order)]


class GridSearch(Search):
    """Every combination of the grids, up to `trials`."""

    def __init__(self, spaces: Sequence[Space], trials: int | None, points: int) -> None:
        every = list(grid(spaces, points))
        self.every = every if trials is None else every[:trials]
        super().__init__(spaces, len(self.every))

    def next(self, trials: Sequence[Trial]) -> Step | None:
        """Return the next combination."""
        number = len(trials)
        return Step(number, self.every[number]) if number < self.trials else None


class RandomSearch(Search):
    """Independent random trials."""

    def next(self, trials: Sequence[Trial]) -> Step | None:
        """Return another random trial."""
        number = len(trials)
        return Step(number, self.random_settings(number)) if number < self.trials else None


class BayesianSearch(Search):
    """Random trials at first, then where a Gaussian process expects the largest improvement.

    Trials that still run count as if they had the mean of the results, so that trials at the same time differ. Failed
    trials count as the worst result.
    """

    def next(self, trials: Sequence[Trial]) -> Step | None:
        """Return the next trial."""
        number = len(trials)
        if number >= self.trials:
            return None
        results = [self._gain(trial.results.get(0)) for trial in trials if 0 in trial.results]
        known = [value for value in results if value is not None]
        if len(known) < max(3, min(2 * len(self.spaces), self.trials // 3)):
            return Step(number, self.random_settings(number))
        mean, worst = sum(known) / len(known), min(known)
        gains: list[float] = []
        for trial in trials:
            found = self._gain(trial.results[0]) if 0 in trial.results else mean
            gains.append(worst if found is None else found)
        points = [points_of(self.spaces, trial.settings) for trial in trials]
        tried = {tuple(trial.settings.items()) for trial in trials}
        for point in suggest(points, gains, seed=self.seed * 100_003 + number):
            settings = settings_at(self.spaces, point)
            if tuple(settings.items()) not in tried:
                return Step(number, settings)
        return Step(number, self.random_settings(number))

    def _gain(self, value: float | None) -> float | None:
        """Return a result of which more is better; None if it failed."""
        if value is None or not math.isfinite(value):
            return None
        return -value if self.lower_is_better else value


class Hyperband(Search):
    """Successive halving (Jamieson and Talwalkar, 2016) in one or more brackets (Hyperband, Li et al., 2018, algorithm
    1).

    A bracket starts many random trials with a small budget. The best of them, one in `eta`, go on with a budget that is
    `eta` times as large, until the largest budget:

        budget      1   1   1   1   1   1   1   1   1
                    |       |               |
        budget 3    3       3               3
                            |
        budget 9            9

    Further brackets start with fewer trials and larger budgets, in case small budgets mislead. They differ from the
    paper in how many they start with: the number of the bracket before, divided by `eta`.
    """

    def __init__(
        self,
        spaces: Sequence[Space],
        trials: int,
        seed: int = 1,
        *,
        lower_is_better: bool = False,
        smallest: int = 1,
        largest: int = 9,
        eta: int = 3,
        brackets: int = 1,
    ) -> None:
        super().__init__(spaces, trials, seed, lower_is_better=lower_is_better)
        self.eta = eta
        budgets = [largest]
        while (lower := budgets[0] // eta) >= smallest:
            budgets.insert(0, lower)
        self.budgets = budgets
        self.rungs = [self._bracket(index) for index in range(min(brackets, len(budgets)))]

    def _bracket(self, index: int) -> list[tuple[int, int]]:
        """Return the (number of trials, budget) of each rung of a bracket."""
        count, rungs = max(1, -(-self.trials // self.eta**index)), []
        for budget in self.budgets[index:]:
            rungs.append((count, budget))
            count = max(1, count // self.eta)
        return rungs

    @property
    def starts(self) -> int:
        """Number of trials that all brackets start."""
        return sum(rungs[0][0] for rungs in self.rungs)

    def next(self, trials: Sequence[Trial]) -> Step | None:
        """Return a promotion if there is one, else a new trial."""
        first = 0
        for rungs in self.rungs:
            members = list(trials[first : first + rungs[0][0]])
            complete = len(members) == rungs[0][0]
            promoted = self._promotion(members, rungs) if complete else None
            if promoted is not None:
                return promoted
            if not complete:
                number = len(trials)
                return Step(number, self.random_settings(number), rungs[0][1])
            first += rungs[0][0]
        return None

    def _promotion(self, members: list[Trial], rungs: list[tuple[int, int]]) -> Step | None:
        """Return a trial of a bracket that goes on with a larger budget; None while there is none."""
        for (_, budget), (kept, larger) in pairwise(rungs):
            if any(budget not in trial.results for trial in members):
                return None
            good = [trial for trial in members if trial.results[budget] is not None]
            best = self.ranked([(trial.results[budget], trial.number) for trial in good])[:kept]
            members = [trial for trial in good if trial.number in best]
            for trial in members:
                if larger not in trial.results and trial.running is None:
                    return Step(trial.number, trial.settings, larger)
        return None
