"""Noise is Gumbel, differs in everything that names it, and does not depend on what it is made together with."""

import math

import torch
from torch import Tensor

from megarl.rollout.noise import EVALUATION, TRAINING, add_gumbel, sequence_key

KEYS = torch.tensor([sequence_key(1, TRAINING, 0, prompt, 0) for prompt in range(64)])


def gumbel(keys: Tensor, positions: Tensor, count: int, start: int = 0) -> Tensor:
    """Standard Gumbel noise [rows, count] of the token ids from `start`, float32."""
    return add_gumbel(torch.zeros(keys.shape[0], count, device=keys.device), keys, positions, start)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(KEYS, torch.arange(64), 16384).flatten().double()  # a million
    assert abs(float(noise.mean()) - 0.577216) < 0.006
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    ordered = torch.sort(noise).values
    distribution = torch.exp(-torch.exp(-ordered))
    expected = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert float((distribution - expected).abs().max()) < 1.63 / len(ordered) ** 0.5  # Kolmogorov-Smirnov at 1 %


def test_the_tail_is_fine_and_finite() -> None:
    noise = gumbel(KEYS.repeat(4), torch.arange(256), 32768)
    assert bool(torch.isfinite(noise).all())
    largest = torch.sort(noise.flatten(), descending=True).values[:1000]
    assert len(largest.unique()) > 990  # large noise decides draws, so it must not come in coarse steps
    assert 12 < float(largest[0]) < 23


def test_rows_positions_and_tokens_are_uncorrelated() -> None:
    noise = gumbel(KEYS, torch.zeros(64, dtype=torch.int64), 4096)
    shifted = gumbel(KEYS, torch.ones(64, dtype=torch.int64), 4096)
    rows = torch.corrcoef(noise)
    limit = 5 / 4096**0.5
    assert float((rows - torch.eye(64)).abs().max()) < limit
    assert abs(float(torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), shifted.flatten()]))[0, 1])) < 0.01


def test_every_part_of_the_name_counts() -> None:
    names = [(1, TRAINING, 0, 0, 0), (2, TRAINING, 0, 0, 0), (1, EVALUATION, 0, 0, 0), (1, TRAINING, 1, 0, 0)]
    names += [(1, TRAINING, 0, 1, 0), (1, TRAINING, 0, 0, 1), (0, 1, 0, 0, 0)]
    keys = [sequence_key(*name) for name in names]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def test_a_number_does_not_depend_on_its_company() -> None:
    positions = torch.arange(64)
    together = gumbel(KEYS, positions, 5000)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(KEYS[order], positions[order], 5000), together[order])
    assert torch.equal(gumbel(KEYS[:1], positions[:1], 5000), together[:1])
    shards = [gumbel(KEYS, positions, 1250, start) for start in range(0, 5000, 1250)]
    assert torch.equal(torch.cat(shards, 1), together)


def test_noise_is_added_to_scores_and_leaves_them_as_they_are() -> None:
    scores = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    scores[3, 7] = -torch.inf
    before = scores.clone()
    noisy = add_gumbel(scores, KEYS, torch.arange(64), 0)
    assert torch.equal(scores, before)
    assert noisy[3, 7] == -torch.inf
    finite = scores.isfinite()
    assert torch.allclose((noisy - scores)[finite], gumbel(KEYS, torch.arange(64), 100)[finite], atol=2e-6)
