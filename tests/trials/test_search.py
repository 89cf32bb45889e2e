"""Searches over fast fake trials: what they try, that they find good settings, and that they go on after a cut."""

import copy
import math
from collections.abc import Callable

import pytest

from megarl.trials.search import BayesianSearch, GridSearch, Hyperband, RandomSearch, Search, Step, Trial
from megarl.trials.spaces import parse_space

SPACES = [parse_space("optim.lr", "loguniform(1e-6,1e-1)"), parse_space("x", "uniform(0,1)")]
Measure = Callable[[dict[str, str], int], float | None]


def bowl(settings: dict[str, str], budget: int = 0) -> float:
    """A loss with its minimum at optim.lr=1e-3 and x=0.7."""
    return (math.log10(float(settings["optim.lr"])) + 3) ** 2 / 4 + (float(settings["x"]) - 0.7) ** 2 * 4


def run(
    search: Search, measure: Measure = bowl, at_once: int = 1, trials: list[Trial] | None = None, most: int = 1000
) -> tuple[list[Trial], list[Step]]:
    """Run a search with fake trials, of which the first that was started ends first."""
    trials, steps, waiting = ([] if trials is None else trials), [], []
    for _ in range(most):
        while len(waiting) < at_once and (step := search.next(trials)) is not None:
            if step.number == len(trials):
                trials.append(Trial(step.number, step.settings))
            trials[step.number].running = step.budget
            steps.append(step)
            waiting.append(step)
        if not waiting:
            break
        ended = waiting.pop(0)
        trial = trials[ended.number]
        trial.running = None
        trial.results[ended.budget] = measure(trial.settings, ended.budget)
    return trials, steps


def best(trials: list[Trial]) -> float:
    return min(value for trial in trials for value in trial.results.values() if value is not None)


SEARCHES: dict[str, Callable[[], Search]] = {
    "grid": lambda: GridSearch(SPACES, None, 4),
    "random": lambda: RandomSearch(SPACES, 12, 1, lower_is_better=True),
    "bayesian": lambda: BayesianSearch(SPACES, 12, 1, lower_is_better=True),
    "hyperband": lambda: Hyperband(SPACES, 9, 1, lower_is_better=True, brackets=2),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_is_cut_goes_on_as_if_it_had_not_been(name: str) -> None:
    whole, _ = run(SEARCHES[name]())
    for most in (1, 4, 7):
        trials, _ = run(SEARCHES[name](), most=most)
        again, _ = run(SEARCHES[name](), trials=copy.deepcopy(trials))
        assert again == whole


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("at_once", [1, 3])
def test_every_trial_differs_and_none_is_repeated(name: str, at_once: int) -> None:
    trials, steps = run(SEARCHES[name](), at_once=at_once)
    assert len({tuple(trial.settings.items()) for trial in trials}) == len(trials) > 8
    assert len({(step.number, step.budget) for step in steps}) == len(steps)
    assert all(trial.running is None for trial in trials)


@pytest.mark.parametrize("name", SEARCHES)
def test_failed_trials_stop_no_search(name: str) -> None:
    calls = iter(range(10_000))
    trials, _ = run(SEARCHES[name](), lambda settings, budget: None if next(calls) % 2 else bowl(settings))
    assert len(trials) > 8
    all_failed, _ = run(SEARCHES[name](), lambda settings, budget: None)
    assert len(all_failed) == len(trials)


def test_the_grid_has_every_combination_and_may_be_cut() -> None:
    trials, _ = run(SEARCHES["grid"]())
    assert len(trials) == 16
    assert len(run(GridSearch(SPACES, 5, 4))[0]) == 5


def test_the_seed_decides_what_is_tried() -> None:
    first, again, other = (run(RandomSearch(SPACES, 5, seed))[0] for seed in (1, 1, 2))
    assert first == again != other


def test_a_bayesian_search_finds_better_settings_than_a_random_one() -> None:
    seeds = range(1, 9)
    ours = [best(run(BayesianSearch(SPACES, 20, seed, lower_is_better=True))[0]) for seed in seeds]
    random = [best(run(RandomSearch(SPACES, 20, seed, lower_is_better=True))[0]) for seed in seeds]
    assert sum(ours) < sum(random) / 4
    assert sorted(ours)[4] < 0.02


def test_a_bayesian_search_maximises_too() -> None:
    found = run(BayesianSearch(SPACES, 20, 1), lambda settings, budget: -bowl(settings))[0]
    assert max(trial.results[0] or -9.0 for trial in found) > -0.05


def test_successive_halving_keeps_the_best_third() -> None:
    trials, steps = run(Hyperband(SPACES, 9, 1, lower_is_better=True, smallest=1, largest=9))
    by_budget = {budget: [step.number for step in steps if step.budget == budget] for budget in (1, 3, 9)}
    assert {budget: len(numbers) for budget, numbers in by_budget.items()} == {1: 9, 3: 3, 9: 1}
    order = sorted(range(9), key=lambda number: bowl(trials[number].settings))
    assert sorted(by_budget[3]) == sorted(order[:3])
    assert by_budget[9] == order[:1]


def test_a_promotion_waits_for_the_whole_rung() -> None:
    search = Hyperband(SPACES, 3, 1, smallest=1, largest=3)
    trials = [Trial(number, {"optim.lr": "1e-3", "x": str(number)}, {1: 1.0}) for number in range(2)]
    trials.append(Trial(2, {"optim.lr": "1e-3", "x": "2"}, running=1))
    assert search.next(trials) is None
    trials[2].running = None
    trials[2].results[1] = 2.0
    assert search.next(trials) == Step(2, trials[2].settings, 3)


def test_further_brackets_start_with_fewer_trials_and_larger_budgets() -> None:
    search = Hyperband(SPACES, 9, 1, smallest=1, largest=9, brackets=3)
    assert [rungs[0] for rungs in search.rungs] == [(9, 1), (3, 3), (1, 9)]
    trials, _ = run(search)
    assert len(trials) == search.starts == 13


def test_failed_trials_are_not_promoted() -> None:
    trials, _ = run(
        Hyperband(SPACES, 9, 1, lower_is_better=True),
        lambda settings, budget: None if budget == 1 and bowl(settings) < 1 else bowl(settings),
    )
    assert all(1 not in trial.results or trial.results[1] is not None for trial in trials if len(trial.results) > 1)
    assert sum(len(trial.results) > 1 for trial in trials) > 0
