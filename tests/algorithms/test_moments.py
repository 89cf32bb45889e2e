"""Running moments: by hand, over batches, and across a resume."""

import math

import pytest
import torch

import megarl.algorithms as a
from megarl.errors import NumericsError
from tests.refusals import refused


def test_moments_by_hand_over_two_batches() -> None:
    moments = a.RunningMoments()
    mean, std = moments.update(torch.tensor([1.0, 3.0]))
    assert (mean.item(), std.item()) == (2.0, pytest.approx(math.sqrt(2)))
    # 1, 3 and 5: mean 3, variance 8/2
    mean, std = moments.update(torch.tensor([5.0]))
    assert (mean.item(), std.item()) == (3.0, 2.0)


def test_any_cut_gives_the_moments_of_the_whole() -> None:
    values = torch.randn(50, dtype=torch.float64) * 3 + 1000
    moments = a.RunningMoments()
    for batch in values.split([1, 20, 0, 29]):
        mean, std = moments.update(batch)
    torch.testing.assert_close(mean, values.mean())
    torch.testing.assert_close(std, values.std())


def test_one_value_or_none_leaves_the_scale_alone() -> None:
    moments = a.RunningMoments()
    assert moments.update(torch.tensor([]))[1].item() == 1
    assert moments.update(torch.tensor([5.0]))[1].item() == 1


def test_restored_moments_go_on_bit_for_bit() -> None:
    first, second = a.RunningMoments(), a.RunningMoments()
    first.update(torch.tensor([0.1, 0.2, 0.7]))
    second.load_state_dict(first.state_dict())
    batch = torch.tensor([0.3, 0.9])
    assert first.update(batch) == second.update(batch)
    assert first.state_dict() == second.state_dict()


def test_a_nan_is_refused_and_does_not_stay_in_the_moments() -> None:
    moments = a.RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    with refused(NumericsError, key="running mean"):
        moments.update(torch.tensor([math.nan]))
    assert moments.mean == 2
