"""Every number of every dtype counts."""

import math

import pytest
import torch

from megarl.parallel.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_among_good_ones_is_seen(dtype: torch.dtype, bad: float) -> None:
    values = torch.linspace(-1, 1, 1000).to(dtype).reshape(10, 100)
    assert is_finite(values)
    values[7, 31] = bad
    assert not is_finite(values)


def test_the_largest_values_of_a_dtype_are_finite() -> None:
    assert is_finite(torch.full((1000,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))


def test_nothing_and_whole_numbers_are_finite() -> None:
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.arange(3))
