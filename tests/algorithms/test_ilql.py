"""ILQL's loss by hand, where its gradients go, and the positions of states and actions."""

import math

import pytest
import torch
from torch import Tensor

import megarl.algorithms as a
from megarl.errors import DataError
from tests.refusals import refused

SCALES = {"tau": 0.7, "gamma": 0.5, "cql_scale": 0.1, "awac_scale": 2.0, "awac_beta": 1.0}


def two_actions() -> dict[str, Tensor | list[Tensor]]:
    """Two actions, the second terminal, and one padded slot of junk."""
    junk = math.nan
    return {
        "q": [torch.tensor([[1.0, 2.0, junk]])],
        "target_q": [torch.tensor([[3.0, 0.0, junk]]), torch.tensor([[2.0, 1.0, junk]])],
        "v": torch.tensor([[1.0, 1.0, junk]]),
        "next_v": torch.tensor([[4.0, math.inf, junk]]),
        "q_nll": [torch.tensor([[0.5, 1.5, junk]])],
        "policy_nll": torch.tensor([[1.0, 2.0, junk]]),
        "rewards": torch.tensor([[0.0, 5.0, junk]]),
        "not_done": torch.tensor([[1, 0, 0]]),
        "mask": torch.tensor([[1, 1, 0]]),
    }


def test_the_loss_by_hand() -> None:
    loss, stats = a.ilql_loss(**two_actions(), **SCALES)
    # Targets: 0 + 0.5*4 = 2, and 5, as nothing follows.   (1 - 2)^2 + (2 - 5)^2
    assert stats["loss_q"].item() == pytest.approx((1 + 9) / 2)
    # Q_hat: 2 and 0, the smaller heads; against V = 1: +1 weighs 0.7, -1 weighs 0.3.
    assert stats["loss_v"].item() == pytest.approx((0.7 + 0.3) / 2)
    assert stats["loss_cql"].item() == pytest.approx((0.5 + 1.5) / 2)
    awac = (1 * math.e + 2 / math.e) / 2
    assert stats["loss_awac"].item() == pytest.approx(awac)
    assert loss.item() == pytest.approx(5 + 0.5 + 0.1 * 1 + 2 * awac)


def test_gradients_reach_only_what_is_learnt_and_no_padding() -> None:
    inputs = two_actions()
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves |= {name: inputs[name][0] for name in ("q", "target_q", "q_nll")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # also no nan that is only hidden further down
        loss, stats = a.ilql_loss(**inputs, **SCALES)
        loss.backward()
    # d/dq (q - target)^2 / 2; d/dv of the expectile, -2*weight*(Q_hat - V) / 2, and none through the weight
    torch.testing.assert_close(leaves["q"].grad, torch.tensor([[-1.0, -3.0, 0.0]]))
    torch.testing.assert_close(leaves["v"].grad, torch.tensor([[-0.7, 0.3, 0.0]]))
    torch.testing.assert_close(leaves["q_nll"].grad, torch.tensor([[0.05, 0.05, 0.0]]))
    torch.testing.assert_close(leaves["policy_nll"].grad, torch.tensor([[math.e, 1 / math.e, 0.0]]))
    assert leaves["next_v"].grad is None
    assert leaves["target_q"].grad is None
    assert not any(value.requires_grad for value in stats.values())


def test_two_heads_both_learn() -> None:
    inputs = two_actions()
    _, one = a.ilql_loss(**inputs, **SCALES)
    doubled = {**inputs, "q": inputs["q"] * 2, "q_nll": inputs["q_nll"] * 2}
    _, two = a.ilql_loss(**doubled, **SCALES)
    assert two["loss_q"].item() == pytest.approx(2 * one["loss_q"].item())
    assert two["loss_cql"].item() == pytest.approx(2 * one["loss_cql"].item())


def test_microbatches_add_up_to_the_whole_batch() -> None:
    torch.manual_seed(0)
    names = ("v", "next_v", "policy_nll", "rewards")
    batch = {name: torch.randn(5, 4, dtype=torch.float64) for name in names}
    heads = {name: torch.randn(2, 5, 4, dtype=torch.float64) for name in ("q", "target_q", "q_nll")}
    batch |= {name: (torch.rand(5, 4) < 0.6).double() for name in ("not_done", "mask")}
    batch["mask"][3] = 0

    def loss(rows: slice, denominator: Tensor | None) -> Tensor:
        cut = {name: x[rows] for name, x in batch.items()}
        cut_heads = {name: [head[rows] for head in x] for name, x in heads.items()}
        return a.ilql_loss(**cut, **cut_heads, **SCALES, denominator=denominator)[0]

    count = batch["mask"].sum()
    parts = [loss(rows, count) for rows in (slice(0, 3), slice(3, 4), slice(4, 5))]
    torch.testing.assert_close(torch.stack(parts).sum(), loss(slice(0, 5), None))


def test_a_batch_without_actions_costs_nothing() -> None:
    loss, _ = a.ilql_loss(**{**two_actions(), "mask": torch.zeros(1, 3)}, **SCALES)
    assert loss.item() == 0


def test_scores_tilt_the_policy_by_the_advantage_and_keep_forbidden_tokens_out() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    q = torch.tensor([[3.0, 1.0, 9.0]])
    want = torch.tensor([[math.log(0.5) + 2 * 2.0, math.log(0.5), -math.inf]])
    torch.testing.assert_close(a.ilql_scores(logits, q, torch.tensor([[1.0]]), beta=2.0), want)
    torch.testing.assert_close(a.ilql_scores(logits, [q, q + 1], torch.tensor([1.0]), beta=2.0), want)


def test_actions_stand_one_before_the_tokens_they_choose() -> None:
    # Prompt 7 8, output 9, prompt 6, output 5 4; the second row is shorter.
    dialogs = [
        [(False, [7, 8]), (True, [9]), (False, [6]), (True, [5, 4])],
        [(False, [3]), (True, [2])],
    ]
    batch = a.collate_dialogs(dialogs, torch.tensor([1.5, -1.0]))
    assert batch.input_ids.tolist() == [[7, 8, 9, 6, 5, 4], [3, 2, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.actions_ixs.tolist() == [[1, 3, 4], [0, 0, 0]]
    assert batch.states_ixs.tolist() == [[1, 3, 4, 5], [0, 1, 0, 0]]
    assert batch.dones.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.rewards.tolist() == [[0, 0, 1.5], [-1.0, 0, 0]]


@pytest.mark.parametrize("returns", [[2.0, 2.0], [5.0]])
def test_returns_without_spread_become_zero(returns: list[float]) -> None:
    assert a.standardize_returns(torch.tensor(returns)).tolist() == [0.0] * len(returns)


@pytest.mark.parametrize("dialog", [[(False, [1, 2])], [(True, [1]), (False, [2])]])
def test_a_dialogue_that_offers_no_state_or_no_action_is_refused_by_number(
    dialog: list[tuple[bool, list[int]]],
) -> None:
    good = [(False, [1]), (True, [2])]
    with refused(DataError, where="dialogue 1"):
        a.collate_dialogs([good, dialog], torch.zeros(2))


def test_the_state_that_follows_is_that_of_the_next_action() -> None:
    """Between turns, others speak; after a row's last action nothing follows."""
    values = torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0, 4.0, 9.0], [9.0, 5.0, 9.0, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0]])
    next_v, not_done = a.next_state_values(values, mask)
    assert next_v[mask != 0].tolist() == [2, 3, 4, 0, 0]
    assert not_done.tolist() == [[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]


def test_the_next_state_agrees_with_the_laid_out_batch() -> None:
    """`collate_dialogs` lists the states; the V of the state after each is what `next_state_values` finds."""
    dialogs = [[(False, [1, 2]), (True, [3, 4])], [(False, [1]), (True, [2]), (False, [3, 4]), (True, [5, 6])]]
    batch = a.collate_dialogs(dialogs, torch.tensor([0.0, 1.0]))
    time = batch.input_ids.shape[1]
    values = torch.randn(2, time)  # values[t] of the state that token t is chosen in: position t - 1
    mask = torch.zeros(2, time)
    for row, (actions, dones) in enumerate(zip(batch.actions_ixs, batch.dones[:, :-1], strict=True)):
        mask[row, actions[dones != 0] + 1] = 1
    next_v, not_done = a.next_state_values(values, mask)
    for row, (actions, states, dones) in enumerate(zip(batch.actions_ixs, batch.states_ixs, batch.dones, strict=True)):
        for number in range(int(dones.sum())):
            token = int(actions[number]) + 1
            assert not_done[row, token] == dones[number + 1]
            if dones[number + 1]:
                assert next_v[row, token] == values[row, states[number + 1] + 1]


@pytest.mark.parametrize(("value", "count"), [(0.1, 1000), (1 / 3, 7), (0.7, 7), (5.0, 1)])
def test_equal_returns_standardise_to_zero(value: float, count: int) -> None:
    """Although their mean, rounded, may differ from them."""
    assert torch.equal(a.standardize_returns(torch.full((count,), value)), torch.zeros(count))
