"""Group baselines by hand; single members and equal scores."""

import pytest
import torch

import megarl.algorithms as a

SCORES = torch.tensor([1.0, 10.0, 3.0, 5.0])
GROUPS = torch.tensor([4, 7, 4, 4])  # 1, 3 and 5 belong together: mean 3, deviation 2; 10 is alone


def test_grpo_by_hand() -> None:
    torch.testing.assert_close(a.grpo_advantages(SCORES, GROUPS), torch.tensor([-1.0, 10.0, 0.0, 1.0]))
    centred = a.grpo_advantages(SCORES, GROUPS, normalize=False)
    torch.testing.assert_close(centred, torch.tensor([-2.0, 10.0, 0.0, 2.0]))


def test_rloo_by_hand() -> None:
    # 1 - (3 + 5)/2, 3 - (1 + 5)/2, 5 - (1 + 3)/2
    torch.testing.assert_close(a.rloo_advantages(SCORES, GROUPS), torch.tensor([-3.0, 10.0, 0.0, 3.0]))


def test_opo_by_hand() -> None:
    # (1*1 + 1*3 + 2*5) / 4 = 3.5
    got = a.opo_advantages(SCORES, GROUPS, torch.tensor([1, 9, 1, 2]))
    torch.testing.assert_close(got, torch.tensor([-2.5, 10.0, -0.5, 1.5]))


def test_opo_of_a_group_of_empty_responses_is_finite() -> None:
    assert a.opo_advantages(SCORES, GROUPS, torch.zeros(4)).isfinite().all()


def test_reinforce_pp_baseline_by_hand() -> None:
    # Centred scores -1 and 1, on two and one tokens: mean -1/3, variance (2*(2/3)^2 + (4/3)^2)/2 = 4/3
    mask = torch.tensor([[1, 1], [1, 0]])
    got = a.reinforce_pp_baseline_advantages(torch.tensor([2.0, 4.0]), torch.tensor([0, 0]), mask)
    unit = (4 / 3) ** 0.5
    want = torch.tensor([[-2 / 3 / unit, -2 / 3 / unit], [4 / 3 / unit, 0.0]])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", [0.1, 1 / 3, -1e4 / 7])
def test_equal_scores_get_exactly_nothing_in_float32(score: float, normalize: bool) -> None:
    scores, groups = torch.full((7,), score), torch.zeros(7, dtype=torch.long)
    assert (a.grpo_advantages(scores, groups, normalize) == 0).all()
    assert (a.rloo_advantages(scores, groups) == 0).all()


def test_a_singleton_does_not_depend_on_its_neighbours() -> None:
    alone = a.grpo_advantages(torch.tensor([0.3]), torch.tensor([0]))
    among = a.grpo_advantages(torch.tensor([0.3, 5.0, 7.0]), torch.tensor([0, 1, 1]))
    assert alone.item() == among[0].item() == pytest.approx(0.3, rel=1e-5)


def test_groups_may_be_any_ids_in_any_order() -> None:
    names = ["b", "a", "b", "b"]
    assert torch.equal(a.grpo_advantages(SCORES, names), a.grpo_advantages(SCORES, GROUPS))
    order = torch.tensor([3, 0, 2, 1])
    shuffled = a.rloo_advantages(SCORES[order], GROUPS[order])
    torch.testing.assert_close(shuffled, a.rloo_advantages(SCORES, GROUPS)[order])


def test_gradients_through_groups_without_spread_are_finite() -> None:
    scores = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    a.grpo_advantages(scores, torch.tensor([0, 0, 1])).sum().backward()
    assert scores.grad.isfinite().all()
