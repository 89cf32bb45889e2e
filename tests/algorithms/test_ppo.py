"""PPO's losses by hand, their statistics, and what must not reach their gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import megarl.algorithms as a
from megarl.errors import ConfigError
from tests.refusals import refused


def log(*ratios: float) -> Tensor:
    """A row of log-ratios."""
    return torch.tensor([ratios]).log()


def test_the_policy_loss_takes_the_worse_of_plain_and_clipped() -> None:
    logprobs = log(1.5, 0.5, 1.5, 1.1).requires_grad_()
    advantages = torch.tensor([[1.0, -2.0, -1.0, 3.0]])
    loss, stats = a.ppo_policy_loss(logprobs, torch.zeros(1, 4), advantages, torch.ones(1, 4))
    loss.backward()
    # -1.2 (clipped), 1.6 (clipped), 1.5 (plain is worse), -3.3 (inside)
    assert loss.item() == pytest.approx((-1.2 + 1.6 + 1.5 - 3.3) / 4)
    # A clipped token does not pull; the others pull by -A*ratio.
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 1.5, -3.3]]) / 4)
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio"].item() == pytest.approx(4.6 / 4)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["approx_kl"].item() == pytest.approx(-math.log(1.5 * 0.5 * 1.5 * 1.1) / 4)


def test_clip_low_and_clip_high_are_separate_bounds() -> None:
    loss, _ = a.ppo_policy_loss(
        log(2.0, 0.1), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), 0.3, 0.5
    )
    assert loss.item() == pytest.approx((-1.5 + 0.7) / 2)


def test_dual_clip_bounds_only_tokens_of_negative_advantage() -> None:
    advantages = torch.tensor([[-1.0, -1.0, 1.0]])
    loss, stats = a.ppo_policy_loss(log(5.0, 2.0, 5.0), torch.zeros(1, 3), advantages, torch.ones(1, 3), dual_clip=3.0)
    assert loss.item() == pytest.approx((3.0 + 2.0 - 1.2) / 3)
    assert stats["dual_clip_fraction"].item() == pytest.approx(1 / 3)


def test_the_sequence_ratio_is_the_geometric_mean_over_the_rows_own_tokens() -> None:
    # Row 0: sqrt(4 * 1) = 2 on both tokens; row 1: 1.1 on its only token, whatever padding holds.
    logprobs = torch.cat([log(4.0, 1.0, 1.0), log(1.1, 1.0, 1.0)])
    logprobs[:, 2], logprobs[1, 1] = math.nan, math.inf
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    advantages = torch.tensor([[-1.0, -2.0, math.nan], [1.0, math.inf, math.nan]])
    loss, stats = a.ppo_policy_loss(logprobs, torch.zeros(2, 3), advantages, mask, ratio="sequence")
    assert loss.item() == pytest.approx((2.0 + 4.0 - 1.1) / 3)
    assert stats["ratio"].item() == pytest.approx((2 + 2 + 1.1) / 3)


def test_the_first_minibatch_has_ratio_one_clips_nothing_and_pulls_by_the_advantages() -> None:
    logprobs = torch.randn(2, 3).requires_grad_()
    advantages, mask = torch.randn(2, 3), torch.ones(2, 3)
    loss, stats = a.ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    assert stats["ratio"].item() == stats["ratio_max"].item() == 1
    assert stats["clip_fraction"].item() == stats["approx_kl"].item() == 0
    torch.testing.assert_close(logprobs.grad, -advantages / 6)


@pytest.mark.parametrize(("gap", "ratio"), [(500.0, math.exp(20)), (-500.0, math.exp(-20))])
def test_the_log_ratio_is_bounded_before_exp(gap: float, ratio: float) -> None:
    _, stats = a.ppo_policy_loss(torch.tensor([[gap]]), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    assert stats["ratio"].item() == pytest.approx(ratio)


def test_the_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    # V 1.0 from 0.5 may move to 0.7: (0.7 - 2)^2 = 1.69 beats (1 - 2)^2. V 0.0 from 0.1 is inside: 1.
    values = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss, stats = a.ppo_value_loss(
        values, torch.tensor([[0.5, 0.1]]), torch.tensor([[2.0, 1.0]]), torch.ones(1, 2), clip=0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx((1.69 + 1.0) / 4)
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.5]]))
    assert stats["clip_fraction"].item() == 0.5
    assert stats["value_error"].item() == pytest.approx(1.0)


def test_no_gradient_reaches_the_old_policy_the_old_values_or_the_returns() -> None:
    one = torch.ones(1, 2)
    new, old, returns = (torch.randn(1, 2, requires_grad=True) for _ in range(3))
    a.ppo_policy_loss(new, old, one, one)[0].backward()
    a.ppo_value_loss(new, old, returns, one)[0].backward()
    assert new.grad is not None
    assert old.grad is None
    assert returns.grad is None


def policy(objective: str, ratio: str, aggregation: str) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    how: dict[str, Any] = {"objective": objective, "ratio": ratio, "aggregation": aggregation, "norm": 7}
    if objective == "clipped":
        how["dual_clip"] = 1.5

    def loss(*tensors: Tensor, denominator: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return a.ppo_policy_loss(*tensors, **how, denominator=denominator)

    return loss


LOSSES = {
    **{
        f"{objective}-{ratio}-{how}": (policy(objective, ratio, how), how)
        for objective in a.OBJECTIVES
        for ratio in a.RATIOS
        for how in a.AGGREGATIONS
    },
    "value": (a.ppo_value_loss, "token_mean"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_junk_in_masked_slots_changes_neither_loss_nor_gradient_nor_statistics(name: str, junk: float) -> None:
    loss_fn, _ = LOSSES[name]
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    clean = [torch.randn(3, 5, dtype=torch.float64) for _ in range(3)]
    results = []
    for filler in (0.0, junk):
        inputs = [torch.where(mask.bool(), x, filler).requires_grad_() for x in clean]
        loss, stats = loss_fn(*inputs, mask)
        loss.backward()
        results.append([loss.detach(), inputs[0].grad, *stats.values()])
    for without, with_junk in zip(*results, strict=True):
        assert with_junk.isfinite().all()
        assert torch.equal(without, with_junk)


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_add_up_to_the_whole_batch(name: str) -> None:
    loss_fn, how = LOSSES[name]
    torch.manual_seed(2)
    mask = (torch.rand(6, 5) < 0.6).double()
    mask[4] = 0
    first, *others = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    whole, parts = (first.clone().requires_grad_() for _ in range(2))
    want, want_stats = loss_fn(whole, *others, mask)
    want.backward()
    got, got_stats = torch.zeros((), dtype=torch.float64), {}
    for rows in (slice(0, 4), slice(4, 5), slice(5, 6)):
        inputs = [x[rows] for x in (parts, *others, mask)]
        loss, stats = loss_fn(*inputs, denominator=a.aggregation_count(mask, how))
        got = got + loss
        got_stats = {key: value + got_stats.get(key, 0) for key, value in stats.items()}
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(parts.grad, whole.grad)
    if how == "token_mean":
        additive = [key for key in want_stats if key != "ratio_max"]
        torch.testing.assert_close(
            {key: got_stats[key] for key in additive}, {key: want_stats[key] for key in additive}
        )


def test_statistics_are_token_means_when_the_denominator_counts_rows() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    _, stats = a.ppo_policy_loss(
        torch.zeros(2, 3),
        torch.zeros(2, 3),
        torch.ones(2, 3),
        mask,
        aggregation="seq_mean_token_mean",
        denominator=64,
    )
    assert stats["ratio"].item() == 1


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_tokens_costs_nothing(name: str) -> None:
    inputs = [torch.full((2, 3), math.nan, requires_grad=True) for _ in range(3)]
    loss, stats = LOSSES[name][0](*inputs, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in stats.values())
    assert torch.equal(inputs[0].grad, torch.zeros(2, 3))


def test_statistics_carry_no_gradient() -> None:
    x = torch.randn(1, 3, requires_grad=True)
    one = torch.ones(1, 3)
    _, policy_stats = a.ppo_policy_loss(x, one, one, one)
    _, value_stats = a.ppo_value_loss(x, one, one, one)
    assert not any(value.requires_grad for value in (*policy_stats.values(), *value_stats.values()))


@pytest.mark.parametrize("wrong", [{"ratio": "row"}, {"aggregation": "sum"}, {"dual_clip": 0.5}])
def test_options_that_cannot_work_are_refused_by_name(wrong: dict[str, object]) -> None:
    one = torch.ones(1, 1)
    ((key, value),) = wrong.items()
    with refused(ConfigError, key=key, value=value):
        a.ppo_policy_loss(one, one, one, one, **wrong)


def test_all_objectives_have_the_same_gradient_at_ratio_one() -> None:
    advantages, mask = torch.randn(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    start = torch.randn(2, 5)
    found = []
    for objective in a.OBJECTIVES:
        logprobs = start.clone().requires_grad_()
        a.ppo_policy_loss(logprobs, start, advantages, mask, objective=objective)[0].backward()
        found.append(logprobs.grad)
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])


def test_cispo_weights_every_token_by_its_clipped_ratio() -> None:
    old, ratios = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.1]])), torch.tensor([[1.5, 0.5, 1.1, 3.0]])
    logprobs = (old + ratios.log()).requires_grad_()
    advantages, mask = torch.tensor([[1.0, -2.0, 3.0, 5.0]]), torch.tensor([[1, 1, 1, 0]])
    loss, stats = a.ppo_policy_loss(logprobs, old, advantages, mask, 1.0, 0.2, objective="cispo")
    loss.backward()
    weights = torch.tensor([1.2, 0.5, 1.1])
    pull = -advantages[0, :3] * weights / 3
    torch.testing.assert_close(logprobs.grad, torch.cat([pull, torch.zeros(1)])[None])
    assert loss.item() == pytest.approx(float((pull * logprobs[0, :3]).sum()))
    assert stats["clip_fraction"].item() == pytest.approx(1 / 3)


def test_the_plain_loss_has_no_ratio() -> None:
    logprobs = torch.tensor([[-1.0, -3.0, math.nan]], requires_grad=True)
    advantages, mask = torch.tensor([[2.0, -1.0, math.inf]]), torch.tensor([[1, 1, 0]])
    loss, stats = a.ppo_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, objective="plain")
    loss.backward()
    assert loss.item() == pytest.approx((2.0 - 3.0) / 2)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, 0.5, 0.0]]))
    assert stats["clip_fraction"].item() == 0.0


@pytest.mark.parametrize("objective", a.OBJECTIVES)
def test_weights_multiply_the_losses_of_their_tokens(objective: str) -> None:
    old, mask = torch.randn(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages, weights = torch.randn(2, 3), torch.tensor([[0.5, 0.0, math.nan], [1.0, 2.0, 0.25]], requires_grad=True)
    logprobs = old + 0.05 * torch.randn(2, 3)
    loss, _ = a.ppo_policy_loss(logprobs, old, advantages, mask, objective=objective, weights=weights)
    scaled = torch.where(mask == 1, advantages * weights.detach(), 0)
    wanted, _ = a.ppo_policy_loss(logprobs, old, scaled, mask, objective=objective)
    torch.testing.assert_close(loss, wanted)
    assert not loss.requires_grad


def test_unknown_objectives_are_refused() -> None:
    with refused(ConfigError, key="objective", value="ppo", offers={"objective": list(a.OBJECTIVES)}):
        a.ppo_policy_loss(*[torch.zeros(1, 1)] * 4, objective="ppo")
