"""Intervals of paired differences, against tables and by simulation."""

import numpy as np
import pytest

from megarl.trials.paired import paired_difference, t_quantile


@pytest.mark.parametrize(
    ("confidence", "freedom", "value"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 9, 2.262), (0.99, 4, 4.604), (0.9, 30, 1.697)],
)
def test_quantiles_are_those_of_the_tables(confidence: float, freedom: int, value: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(value, abs=2e-3)


def test_the_interval_is_worked_out_by_hand() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [2.0, 2.5, 4.5])
    # differences 1, 0.5, 1.5: mean 1, deviation 0.5, error 0.5 / sqrt(3) = 0.28868, times 4.3027
    assert (found.a, found.b, found.mean) == (2.0, 3.0, 1.0)
    assert (found.low, found.high) == pytest.approx((1 - 1.24211, 1 + 1.24211), abs=1e-3)
    assert not found.differs


def test_pairing_removes_what_the_seeds_have_in_common() -> None:
    common = np.array([0.0, 10.0, -20.0, 5.0])
    assert paired_difference(common, common + np.array([1.0, 1.1, 0.9, 1.0])).differs


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_equal_values_do_not_differ_and_a_constant_shift_does(interval: str) -> None:
    same = paired_difference([1.0, 2.0], [1.0, 2.0], interval=interval)
    assert (same.equal, same.differs) == (True, False)
    shifted = paired_difference([1.0, 2.0], [1.5, 2.5], interval=interval)
    assert (shifted.equal, shifted.differs) == (False, True)


def test_one_seed_differs_if_its_values_do() -> None:
    assert not paired_difference([1.0], [1.0]).differs
    assert paired_difference([1.0], [1.0 + 1e-9]).differs


@pytest.mark.parametrize(("interval", "least"), [("t", 0.93), ("bootstrap", 0.87)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(interval: str, least: float) -> None:
    draw, held = np.random.default_rng(0), 0
    for _ in range(300):
        a = draw.normal(0, 1, 10)
        found = paired_difference(a, a + draw.normal(0.3, 1, 10), interval=interval)
        held += found.low <= 0.3 <= found.high
    assert least <= held / 300 <= 0.98
