"""Rewards, GAE and whitening, with numbers worked by hand."""

import math

import pytest
import torch

import megarl.algorithms as a

NAN, INF = math.nan, math.inf


def test_gae_by_hand() -> None:
    # gamma 0.9, lambda 0.5, so what is carried back is weighted by 0.45.
    # t=2: delta = 1 - 0.3                 =  0.7     A =  0.7
    # t=1: delta = 0 + 0.9*0.3 - 0.4       = -0.13    A = -0.13 + 0.45*0.7   =  0.185
    # t=0: delta = 0 + 0.9*0.4 - 0.5       = -0.14    A = -0.14 + 0.45*0.185 = -0.05675
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.4, 0.3]])
    advantages, returns = a.gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.05675, 0.185, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.44325, 0.585, 1.0]]))


def test_gae_steps_over_holes_and_padding_whatever_they_hold() -> None:
    # The episode above, with tool output inside, a prompt before and padding behind.
    rewards = torch.tensor([[NAN, 0.0, INF, 0.0, NAN, NAN, 1.0, 9.0]])
    values = torch.tensor([[INF, 0.5, NAN, 0.4, 8.0, -INF, 0.3, NAN]])
    mask = torch.tensor([[0, 1, 0, 1, 0, 0, 1, 0]])
    advantages, returns = a.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    want = torch.tensor([[0, -0.05675, 0, 0.185, 0, 0, 0.7, 0]])
    torch.testing.assert_close(advantages, want)
    torch.testing.assert_close(returns, torch.tensor([[0, 0.44325, 0, 0.585, 0, 0, 1.0, 0]]))


def test_gae_rows_do_not_see_each_other_and_an_empty_row_gets_nothing() -> None:
    rewards = torch.tensor([[0.0, 1.0], [NAN, NAN], [2.0, NAN]])
    values = torch.tensor([[0.5, 0.5], [NAN, NAN], [0.5, NAN]])
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    advantages, _ = a.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.5, 0.0]]))


def test_gae_leaves_its_inputs_as_they_were() -> None:
    inputs = [torch.randn(3, 4), torch.randn(3, 4), (torch.rand(3, 4) < 0.5).float()]
    before = [x.clone() for x in inputs]
    a.gae(*inputs, gamma=0.9, lam=0.9)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_gae_passes_a_finite_gradient_to_masked_in_values_only() -> None:
    values = torch.tensor([[0.5, NAN, 0.3]], requires_grad=True)
    advantages, _ = a.gae(torch.zeros(1, 3), values, torch.tensor([[1, 0, 1]]), gamma=0.9, lam=0.5)
    advantages.sum().backward()
    # A_2 = -V_2 and A_0 = 0.9*V_2 - V_0 + 0.45*A_2
    torch.testing.assert_close(values.grad, torch.tensor([[-1.0, 0.0, 0.9 - 0.45 - 1.0]]))


def test_reward_to_go_neither_counts_nor_discounts_holes() -> None:
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0, INF]])
    got = a.reward_to_go(rewards, torch.tensor([[1, 0, 1, 1, 0]]), gamma=0.5)
    torch.testing.assert_close(got, torch.tensor([[3.0, 0.0, 4.0, 4.0, 0.0]]))


def test_the_score_lands_on_the_last_action_also_when_that_is_an_eos_equal_to_padding() -> None:
    # Ids 5 6 0 | 0 0 with pad = eos = 0: the first 0 was sampled and is an action; the mask says so.
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    kl = torch.tensor([[0.1, 0.2, 0.3, NAN, INF], [0.5, NAN, 0.0, -0.5, 9.0]])
    got = a.per_token_rewards(torch.tensor([2.0, -1.0]), kl, mask, kl_coef=10.0)
    want = torch.tensor([[-1.0, -2.0, 2.0 - 3.0, 0.0, 0.0], [-5.0, 0.0, 0.0, -1.0 + 5.0, 0.0]])
    torch.testing.assert_close(got, want)


def test_a_row_without_actions_gets_no_score() -> None:
    got = a.per_token_rewards(torch.tensor([NAN]), torch.full((1, 3), NAN), torch.zeros(1, 3), kl_coef=0.1)
    assert torch.equal(got, torch.zeros(1, 3))


def test_whitening_by_hand_over_the_masked_in_entries_only() -> None:
    # 1, 3 and 5: mean 3, variance ((-2)^2 + 0 + 2^2)/(3 - 1) = 4, deviation 2
    x = torch.tensor([[1.0, NAN, 3.0], [1000.0, 5.0, INF]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    torch.testing.assert_close(a.whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    kept = a.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([[2.0, 0.0, 3.0], [0.0, 4.0, 0.0]]))


@pytest.mark.parametrize("masked_in", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_of_nothing_or_one_entry_is_finite(masked_in: int, shift_mean: bool) -> None:
    x = torch.tensor([[7.0, NAN]], requires_grad=True)
    got = a.whiten(x, torch.tensor([[masked_in, 0]]), shift_mean=shift_mean)
    got.sum().backward()
    assert got.tolist() == [[7.0 if masked_in and not shift_mean else 0.0, 0.0]]
    assert x.grad.isfinite().all()


def test_whitening_of_equal_entries_does_not_blow_up_rounding() -> None:
    assert a.whiten(torch.full((2, 4), 3.0), torch.ones(2, 4)).abs().max() < 1e-3


def test_remax_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, NAN]])
    got = a.remax_advantages(rewards, torch.tensor([0.5]), torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(got, torch.tensor([[2.5, 1.5, 0.0]]))
