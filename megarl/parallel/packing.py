"""Pack sequences into bins of equal length, spread pairs of sequences over bins, and round sizes up to a few values."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

WINDOW = 8192
"""Number of sequences that are packed together: a larger window fills bins better and takes longer."""


def pack(lengths: np.ndarray, capacity: int, seed: int = 0, *, shuffle: bool = False) -> list[np.ndarray]:
    """Assign each sequence to one bin of at most `capacity` tokens.

    Sequences are processed in order, or in a seeded random order, `WINDOW` at a time. Within a window the longest
    comes first, and each goes into the fullest bin with enough free space (best fit decreasing).

    Args:
        lengths: tokens of each sequence, [sequences], none above `capacity`.

    Returns:
        The sequence indices of each bin; bins are in the order in which their first sequence was placed.
    """
    order = np.arange(len(lengths))
    if shuffle:
        order = np.random.default_rng([seed, 0x9AC]).permutation(len(lengths))
    bins: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        bins += [window[members] for members in _best_fit(lengths[window], capacity)]
    return bins


def _best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for sequence in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sequence])
        fullest = bisect_left(free, (length, -1))
        if fullest < len(free):
            left, target = free.pop(fullest)
        else:
            left, target = capacity, len(bins)
            bins.append([])
        bins[target].append(int(sequence))
        insort(free, (left - length, target))
    return [np.array(members) for members in sorted((sorted(one) for one in bins), key=lambda one: one[0])]


def spread(lengths: np.ndarray, bins: int) -> list[np.ndarray]:
    """Assign pairs of sequences to a number of bins, so that the fullest bin of each part is short.

    The longest pair comes first, and each goes into the bin that it leaves least full. Below the mean of all bins, or
    the longest sequence, a bin counts by both parts together; above, by the part that exceeds it most.

    Args:
        lengths: tokens of the two parts of each pair, such as a prompt and a response, [pairs, 2].
        bins: their number, at most that of the pairs.

    Returns:
        The indices of the pairs of each bin that has any, in ascending order; bins in the order of their first pairs.
    """
    shares = lengths / np.maximum(lengths.sum(0) / bins, lengths.max(0))
    full = np.zeros((bins, 2))
    members: list[list[int]] = [[] for _ in range(bins)]
    for pair in np.argsort(-shares.max(1), kind="stable"):
        after = full + shares[pair]
        target = np.lexsort((after.sum(1), np.maximum(after.max(1), 1.0)))[0]
        full[target] = after[target]
        members[target].append(int(pair))
    return [np.array(one) for one in sorted(sorted(one) for one in members if one)]


def round_up_to_bucket(n: int, multiple_of: int = 1, *, steps: int = 8) -> int:
    """Return `n` rounded up, so that varying sizes take few values: at most n / `steps` more, plus the rounding to a
    multiple of `multiple_of`."""
    step = max(1, (1 << n.bit_length() - 1) // steps) if n > 0 else 1
    step = -(-step // multiple_of) * multiple_of
    return -(-n // step) * step
