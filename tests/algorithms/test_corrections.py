"""Importance weights by hand: their limits, their levels and what is counted of them."""

import math

import pytest
import torch
from torch import Tensor

import megarl.algorithms as a
from megarl.errors import ConfigError
from tests.refusals import refused

NAN = math.nan


def weights(ratios: list[list[float]], mask: list[list[int]], **how: object) -> tuple[Tensor, dict[str, Tensor]]:
    old = torch.tensor(ratios).log()
    return a.importance_weights(old, torch.zeros_like(old), torch.tensor(mask), **how)  # type: ignore[arg-type]


def test_weights_are_one_where_both_policies_agree() -> None:
    logprobs = torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found, stats = a.importance_weights(logprobs, logprobs.clone(), mask)
    assert found.tolist() == mask.float().tolist()
    assert {name: round(float(value), 6) for name, value in stats.items()} == {
        "mean": 1,
        "max": 1,
        "ess": 1,
        "chi2": 0,
        "kl": 0,
        "limited": 0,
    }


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"method": "truncate", "low": 0.5, "high": 2.0}, [[2.0, 0.5, 0], [1.5, 0, 0]]),
        ({"method": "mask", "low": 0.5, "high": 2.0}, [[0, 0, 0], [1.5, 0, 0]]),
        ({"method": "truncate"}, [[2.0, 0.25, 0], [1.5, 0, 0]]),
        ({"level": "sequence", "high": 3.0}, [[1.0, 1.0, 0], [1.5, 0, 0]]),
        ({"level": "sequence", "method": "mask", "high": 1.2}, [[1.0, 1.0, 0], [0, 0, 0]]),
        ({"level": "sequence_mean"}, [[1.0, 1.0, 0], [1.5, 0, 0]]),
    ],
)
def test_ratios_outside_the_bounds_are_truncated_or_masked(how: dict[str, object], wanted: list[list[float]]) -> None:
    found, _ = weights([[4.0, 0.25, NAN], [1.5, NAN, NAN]], [[1, 1, 0], [1, 0, 0]], **how)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_a_geometric_mean_does_not_grow_with_the_length() -> None:
    long, _ = weights([[1.1] * 40], [[1] * 40], level="sequence_mean", high=9.0)
    product, _ = weights([[1.1] * 40], [[1] * 40], level="sequence", high=99.0)
    torch.testing.assert_close(long, torch.full((1, 40), 1.1))
    torch.testing.assert_close(product, torch.full((1, 40), 1.1**40))


def test_what_is_counted_is_of_the_ratios_before_they_are_limited() -> None:
    _, stats = weights([[4.0, 1.0], [1.0, 2.0]], [[1, 1], [1, 1]], high=1.5)
    assert float(stats["mean"]) == pytest.approx(2.0)
    assert float(stats["max"]) == pytest.approx(4.0)
    assert float(stats["chi2"]) == pytest.approx((16 + 1 + 1 + 4) / 4 - 1)
    assert float(stats["ess"]) == pytest.approx(8**2 / (4 * 22))
    assert float(stats["kl"]) == pytest.approx((8 - math.log(8) - 4) / 4)
    assert float(stats["limited"]) == 0.5


def test_weights_have_no_gradient_and_ratios_are_bounded() -> None:
    old = torch.tensor([[500.0, -500.0]], requires_grad=True)
    found, stats = a.importance_weights(old, torch.zeros(1, 2), torch.ones(1, 2), high=1e30)
    assert not found.requires_grad
    assert torch.isfinite(found).all()
    assert all(math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize(
    ("key", "value"), [("level", "word"), ("method", "clip"), ("low", -0.1), ("low", 1.5), ("high", 0.5)]
)
def test_wrong_settings_are_refused(key: str, value: object) -> None:
    with refused(ConfigError, key=key, value=value):
        weights([[1.0]], [[1]], **{key: value})
