"""The choice of experts, and the losses of the router."""

import pytest
import torch

from megarl.algorithms.routing import balance_loss, choose, z_loss

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 2.0], [1.0, 1.5, -2.0, 0.0]])


def test_weights_are_shares_of_all_experts_or_of_the_chosen_ones() -> None:
    experts, shares = choose(LOGITS, 2, normalise=False)
    assert experts.tolist() == [[0, 1], [1, 3], [1, 0]]
    assert torch.allclose(shares, LOGITS.softmax(-1).gather(1, experts))
    _, weights = choose(LOGITS, 2, normalise=True)
    assert torch.allclose(weights, shares / shares.sum(1, keepdim=True))


def loss_of(logits: torch.Tensor, rows: torch.Tensor, total: float) -> torch.Tensor:
    experts, _ = choose(logits, 2, normalise=True)
    counts = torch.zeros(int(rows.max()) + 1, logits.shape[1])
    for row, chosen in zip(rows.tolist(), experts.tolist(), strict=True):
        counts[row, chosen] += 1
    lengths = torch.bincount(rows).clamp(min=1)
    return balance_loss(logits, counts, rows, lengths, chosen=2, total=total)


def test_balance_is_that_of_switch_transformers_for_one_row() -> None:
    shares = torch.tensor([2, 3, 0, 1]) / 6
    wanted = 4 * (shares * LOGITS.softmax(-1).mean(0)).sum()
    assert float(loss_of(LOGITS, torch.zeros(3, dtype=torch.long), 3.0)) == pytest.approx(float(wanted))


def test_balance_of_rows_is_their_mean_by_tokens_however_they_are_cut() -> None:
    logits, rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)), torch.arange(30) // 10
    together = loss_of(logits, rows, 30.0)
    apart = sum(loss_of(logits[rows == row], torch.zeros(10, dtype=torch.long), 30.0) for row in range(3))
    assert float(together) == pytest.approx(float(apart))


def test_even_probabilities_have_a_balance_of_one_and_squared_logs_of_their_number() -> None:
    assert float(loss_of(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long), 8.0)) == pytest.approx(1.0)
    assert float(z_loss(torch.zeros(8, 4), total=8.0)) == pytest.approx(float(torch.tensor(4.0).log() ** 2))
