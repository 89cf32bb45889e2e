"""Losses of ranked responses: equal to a plain double loop, every prompt counts once, and parts add up to the whole."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megarl.algorithms import bradley_terry_loss, count_units, ranked_pairs, ranking_loss

UNIT = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
LEVEL = torch.tensor([1.0, 0.0, 0.3, 0.9, 0.3, 4.0, 2.0, 3.0, 1.0])
MARGIN = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.2])
PRESENT = torch.ones(9, dtype=torch.bool)


def scores() -> Tensor:
    return torch.randn(9, generator=torch.Generator().manual_seed(1))


def plain_loss(
    scores: Sequence[float], units: Sequence[int], levels: Sequence[float], margins: Sequence[float], center: float
) -> float:
    """The sum over units of the mean loss of their pairs, in plain Python."""
    total = 0.0
    for unit in set(units):
        losses = []
        rows = [row for row in range(len(units)) if units[row] == unit]
        for better in rows:
            for worse in rows:
                if levels[better] > levels[worse]:
                    lead = scores[better] - scores[worse] - margins[better]
                    losses.append(math.log1p(math.exp(-lead)) + center * (scores[better] + scores[worse]) ** 2)
        total += sum(losses) / len(losses)
    return total


def pairs_of(weights: Tensor) -> dict[tuple[int, int], float]:
    """The pairs that have a weight, better row first."""
    found = weights.nonzero().tolist()
    return {(better, worse): float(weights[better, worse]) for better, worse in found}


def loss_over_listed_pairs(
    scores: Tensor, unit: Tensor, level: Tensor, present: Tensor, margin: Tensor | None, center: float
) -> Tensor:
    """The loss as it was: over a list of the pairs, made with `nonzero`."""
    together = (unit[:, None] == unit[None, :]) & present[:, None] & present[None, :]
    is_better = together & (level[:, None] > level[None, :])
    better, worse = is_better.nonzero(as_tuple=True)
    weight = 1 / (together.float() @ is_better.float().sum(dim=1))[better].clamp(min=1)
    lead = scores[better] - scores[worse] - (0 if margin is None else margin[better])
    losses = -torch.nn.functional.logsigmoid(lead) + center * (scores[better] + scores[worse]).square()
    return (weight * losses).sum()


def test_pairs_are_those_of_one_unit_and_different_levels() -> None:
    one, two, six = (1.0,), (0.5,), (1 / 6,)
    assert pairs_of(ranked_pairs(UNIT, LEVEL, PRESENT)) == pytest.approx(
        {
            **dict.fromkeys([(0, 1)], *one),
            **dict.fromkeys([(3, 2), (3, 4)], *two),
            **dict.fromkeys([(5, 6), (5, 7), (5, 8), (7, 6), (7, 8), (6, 8)], *six),
        }
    )


def test_tied_responses_and_fillers_are_in_no_pair() -> None:
    tied = ranked_pairs(torch.tensor([0, 0, 0]), torch.tensor([1.0, 1.0, 1.0]), torch.ones(3, dtype=torch.bool))
    assert not pairs_of(tied)
    present = PRESENT.clone()
    present[:2] = present[8] = False
    assert set(pairs_of(ranked_pairs(UNIT, LEVEL, present))) == {(3, 2), (3, 4), (5, 6), (5, 7), (7, 6)}
    nothing = ranked_pairs(UNIT, LEVEL, torch.zeros(9, dtype=torch.bool))
    some = scores().requires_grad_()
    loss = ranking_loss(some, nothing, MARGIN, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert some.grad is not None
    assert not some.grad.any()


def test_units_are_counted_without_fillers_in_any_order() -> None:
    assert int(count_units(UNIT, PRESENT)) == 3
    present = PRESENT.clone()
    present[:2] = present[5] = False
    assert int(count_units(UNIT, present)) == 2
    assert int(count_units(torch.tensor([4, 1, 4, 1, 0, 4]), torch.ones(6, dtype=torch.bool))) == 3
    assert int(count_units(UNIT, torch.zeros(9, dtype=torch.bool))) == 0


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("margin", [None, MARGIN])
@pytest.mark.parametrize("fillers", [[], [0, 1], [3, 8]])
def test_masks_give_the_loss_and_the_gradient_of_a_list_of_pairs(
    margin: Tensor | None, center: float, fillers: list[int]
) -> None:
    present = PRESENT.clone()
    present[fillers] = False
    ours, theirs = scores().requires_grad_(), scores().requires_grad_()
    loss = ranking_loss(ours, ranked_pairs(UNIT, LEVEL, present), margin, center)
    before = loss_over_listed_pairs(theirs, UNIT, LEVEL, present, margin, center)
    torch.testing.assert_close(loss, before, rtol=1e-6, atol=1e-7)
    for one in (loss, before):
        one.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)


def test_no_shape_follows_from_a_value() -> None:
    """A device without values can compute everything: nothing is read back from it."""
    nowhere = {name: value.to("meta") for name, value in (("unit", UNIT), ("level", LEVEL), ("present", PRESENT))}
    weights = ranked_pairs(**nowhere)
    assert weights.shape == (9, 9)
    assert ranking_loss(scores().to("meta"), weights, MARGIN.to("meta"), 0.1, denominator=3).shape == ()
    assert count_units(nowhere["unit"], nowhere["present"]).shape == ()


def test_what_stands_in_a_filler_does_not_matter() -> None:
    present = PRESENT.clone()
    present[:2] = False
    spoiled, margin = scores(), MARGIN.clone()
    spoiled[:2] = torch.tensor([math.nan, math.inf])
    margin[:2] = math.nan
    spoiled.requires_grad_()
    loss = ranking_loss(spoiled, ranked_pairs(UNIT, LEVEL, present), margin, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert spoiled.grad is not None
    assert spoiled.grad.isfinite().all()


@pytest.mark.parametrize("with_margin", [False, True])
def test_of_pairs_it_is_the_bradley_terry_loss(with_margin: bool) -> None:
    chosen, rejected = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([0.1, 1.0, 5.0])
    lead = torch.tensor([0.0, 1.0, 0.5])
    rows = torch.stack([chosen, rejected], dim=1).flatten()
    unit, level = torch.arange(3).repeat_interleave(2), torch.tensor([1.0, 0.0]).repeat(3)
    pairs = ranked_pairs(unit, level, torch.ones(6, dtype=torch.bool))
    margin = lead.repeat_interleave(2) if with_margin else None
    ours = ranking_loss(rows, pairs, margin, denominator=3)
    torch.testing.assert_close(ours, bradley_terry_loss(chosen, rejected, lead if with_margin else None))


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_of_lists_it_is_a_plain_double_loop_in_which_a_prompt_counts_once(with_margin: bool, center: float) -> None:
    some, margin = scores(), MARGIN if with_margin else torch.zeros(9)
    found = ranking_loss(some, ranked_pairs(UNIT, LEVEL, PRESENT), margin if with_margin else None, center)
    wanted = plain_loss(some.tolist(), UNIT.tolist(), LEVEL.tolist(), margin.tolist(), center)
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    equal = ranking_loss(torch.zeros(9), ranked_pairs(UNIT, LEVEL, PRESENT), denominator=3)
    assert float(equal) == pytest.approx(math.log(2))


def test_the_order_of_rows_does_not_matter() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    some = scores()
    losses = [
        ranking_loss(some[rows], ranked_pairs(UNIT[rows], LEVEL[rows], PRESENT), MARGIN[rows], 0.1)
        for rows in (torch.arange(9), order)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_margin_raises_the_loss_and_centering_pulls_scores_to_zero() -> None:
    pairs = ranked_pairs(torch.tensor([0, 0]), torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool))
    lead = torch.tensor([1.0, 0.5])
    assert float(ranking_loss(lead, pairs, torch.tensor([0.5, 0.5]))) == pytest.approx(math.log(2))
    shifted = torch.tensor([11.0, 10.5], requires_grad=True)
    loss = ranking_loss(shifted, pairs, center_coef=0.1)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-0.5)) + 0.1 * 21.5**2)
    loss.backward()
    assert shifted.grad is not None
    assert (shifted.grad > 3.9).all()


def test_gradients_are_finite_at_any_distance() -> None:
    for distance in (1e4, -1e4):
        some = torch.tensor([distance, 0.0], requires_grad=True)
        pairs = ranked_pairs(torch.tensor([0, 0]), torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool))
        loss = ranking_loss(some, pairs)
        loss.backward()
        assert loss.isfinite()
        assert some.grad is not None
        assert some.grad.isfinite().all()
        assert some.grad[0] == pytest.approx(0.0 if distance > 0 else -1.0)


def test_two_halves_of_a_batch_add_up_to_the_whole() -> None:
    some = scores()

    def loss(rows: Tensor) -> Tensor:
        """The loss of some units, with the number of units of the whole batch."""
        pairs = ranked_pairs(UNIT[rows], LEVEL[rows], PRESENT[rows])
        return ranking_loss(some[rows], pairs, MARGIN[rows], 0.01, denominator=3)

    torch.testing.assert_close(loss(torch.arange(5)) + loss(torch.arange(5, 9)), loss(torch.arange(9)))
