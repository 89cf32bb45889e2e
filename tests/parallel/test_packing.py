"""Packing fills bins and loses nothing; sizes in buckets waste little."""

import numpy as np
import pytest

from megarl.parallel.packing import pack, round_up_to_bucket, spread


def test_packing_puts_every_sequence_in_one_bin_that_holds_it() -> None:
    lengths = np.random.default_rng(0).integers(2, 60, size=500)
    bins = pack(lengths, 64, seed=3, shuffle=True)
    assert sorted(np.concatenate(bins)) == list(range(500))
    filled = np.array([lengths[members].sum() for members in bins])
    assert filled.max() <= 64
    assert len(bins) <= 1.06 * lengths.sum() / 64


def test_packing_by_hand() -> None:
    """Longest first: 7 opens bin A, 5 opens bin B, 4 fits B, 3 fills A, and 2 opens bin C."""
    bins = pack(np.array([3, 7, 5, 2, 4]), 10)
    assert [members.tolist() for members in bins] == [[0, 1], [2, 4], [3]]


def test_packing_is_repeatable_and_follows_the_seed() -> None:
    lengths = np.full(100, 10)
    one, again, other = (
        [members.tolist() for members in pack(lengths, 30, seed=seed, shuffle=True)] for seed in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize("steps", [8, 16])
def test_buckets_are_few_and_waste_little(steps: int) -> None:
    for multiple_of in (1, 2, 8):
        for n in range(1, 3000):
            size = round_up_to_bucket(n, multiple_of, steps=steps)
            assert size >= n
            assert size % multiple_of == 0
            assert size - n < n / steps + multiple_of
    assert len({round_up_to_bucket(n, steps=steps) for n in range(1024, 2048)}) <= steps + 1
    assert round_up_to_bucket(0) == 0


def test_pairs_are_spread_so_that_both_parts_of_every_bin_are_short() -> None:
    lengths = np.random.default_rng(0).integers([5, 2], [60, 40], size=(300, 2))
    bins = spread(lengths, 40)
    assert sorted(np.concatenate(bins)) == list(range(300))
    fullest = np.array([lengths[members].sum(0) for members in bins]).max(0)
    assert (fullest <= 1.1 * lengths.sum(0) / 40).all()


def test_spreading_by_hand() -> None:
    """Bins have 10 of each part on average. (8, 2) and (2, 8) open both; (6, 4) exceeds that by 4 with the first and by
    2 with the second, and (4, 6) by 2 with the first and by more with the second, which is full."""
    bins = spread(np.array([[8, 2], [2, 8], [6, 4], [4, 6]]), 2)
    assert [members.tolist() for members in bins] == [[0, 3], [1, 2]]
