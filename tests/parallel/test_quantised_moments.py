"""Moments in 8 bits: what was decoded is encoded as it was, and errors are small over six decades."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarl.parallel.quantised_moments import BLOCK, SIGNED, UNSIGNED, CodeMap, blocks_of, decode, encode


def moments(count: int, scale: float, codes: CodeMap) -> Tensor:
    """Values over many decades, with some zeros."""
    generator = torch.Generator().manual_seed(count)
    found = torch.randn(count, generator=generator) * 10.0 ** torch.randn(count, generator=generator) * scale
    found[::7] = 0.0
    return found if codes is SIGNED else found.square()


@pytest.mark.parametrize("codes", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-14, 1e-20, 1e10])
@pytest.mark.parametrize("count", [1, 255, 256, 1000, 65536])
def test_what_was_decoded_is_encoded_as_it_was(count: int, scale: float, codes: CodeMap) -> None:
    found, absmax = encode(moments(count, scale, codes), codes)
    assert found.dtype == torch.uint8
    assert found.shape == (count,)
    assert absmax.shape == (blocks_of(count),)
    again, absmax_again = encode(decode(found, absmax, codes), codes)
    assert torch.equal(again, found)
    assert torch.equal(absmax_again, absmax)


@pytest.mark.parametrize("codes", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_every_code_is_encoded_as_it_was(codes: CodeMap) -> None:
    assert len(codes.values) == 255
    assert (codes.values.diff() > 0).all()
    assert codes.values[codes.zero] == 0
    absmax = torch.rand(50) * 10.0 ** torch.randint(-25, 10, (50,))
    every = torch.arange(255, dtype=torch.uint8)
    together = torch.cat([every, every[-1:]]).repeat(50)  # each block has 1, or its absmax would be another
    assert torch.equal(encode(decode(together, absmax, codes), codes)[0], together)


@pytest.mark.parametrize(("codes", "worst"), [(SIGNED, 0.0072), (UNSIGNED, 0.0036)], ids=["signed", "unsigned"])
def test_errors_are_a_hundredth_of_the_largest_value_at_most_and_relative_to_small_ones(
    codes: CodeMap, worst: float
) -> None:
    values = moments(100 * BLOCK, 1.0, codes)
    back = decode(*encode(values, codes), codes)
    absmax = values.abs().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    scaled, error = values.abs() / absmax, (back - values).abs() / absmax
    assert error.max() <= worst
    middle = (scaled > 1e-3) & (scaled < 1)
    assert (error[middle] / scaled[middle]).max() < 0.3
    assert (back.sign() == values.sign())[scaled > 1e-6].all()


def test_a_mean_square_above_zero_is_never_stored_as_zero() -> None:
    """Or AdamW would divide by eps alone as soon as a gradient is 0."""
    values = torch.tensor([1.0, 1e-9, 0.0, 1e-20])
    back = decode(*encode(values, UNSIGNED), UNSIGNED)
    assert back[0] == 1.0
    assert back[2] == 0.0
    assert (back[[1, 3]] > 0).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_visible(broken: float) -> None:
    values = torch.ones(300)
    values[3] = broken
    back = decode(*encode(values, SIGNED), SIGNED)
    assert not back[:BLOCK].isfinite().all()
    assert torch.equal(back[BLOCK:], values[BLOCK:])
