"""Slices of time: every rank has as much work, and what is gathered is in order."""

from typing import Any

import pytest
import torch

from megarl.parallel.context import TimeSlices, slices_of
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from tests.parallel.engines import small_engine
from tests.worlds import Worlds


class GroupOf:
    """A process group that only knows its size and rank."""

    def __init__(self, rank: int, size: int) -> None:
        self.numbers = rank, size

    def rank(self) -> int:
        return self.numbers[0]

    def size(self) -> int:
        return self.numbers[1]


def slices(rank: int, size: int) -> TimeSlices:
    group: Any = GroupOf(rank, size)
    return TimeSlices(group)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_position_belongs_to_one_rank_and_ranks_have_equal_causal_work(size: int) -> None:
    time = 5 * slices_of(size)
    mine = [slices(rank, size).mine(torch.arange(time)[None])[0] for rank in range(size)]
    assert torch.cat(mine).sort().values.tolist() == list(range(time))
    pairs = {int((positions + 1).sum()) for positions in mine}  # of queries and the keys that they attend to
    assert len(pairs) == 1
    for rank, positions in enumerate(mine):
        bounds = slices(rank, size).bounds(time)
        assert positions.tolist() == [position for begin, end in bounds for position in range(begin, end)]


def gathered_and_gradients() -> tuple[list[int], list[float], list[float]]:
    """The order of what is gathered, and the gradient of this rank's part if all ranks use it alike or for their own
    purposes."""
    grid = Grid(Layout(cp=2), start_world())
    own = TimeSlices(grid.groups.cp)
    part = own.mine(torch.arange(8.0)[None]).requires_grad_()
    whole = own.whole(part)
    (whole * torch.arange(8.0)).sum().backward()
    alike = part.grad
    part.grad = None
    (own.shared(part, 1) * torch.arange(8.0) * (grid.rank + 1)).sum().backward()
    assert alike is not None
    assert part.grad is not None
    return whole[0].int().tolist(), alike[0].tolist(), part.grad[0].tolist()


def test_gradients_are_of_the_own_positions_or_summed_over_ranks(worlds: Worlds) -> None:
    for positions, (order, alike, summed) in zip(
        ([0.0, 1.0, 6.0, 7.0], [2.0, 3.0, 4.0, 5.0]), worlds.run(2, gathered_and_gradients), strict=True
    ):
        assert order == list(range(8))
        assert alike == positions
        assert summed == [3 * position for position in positions]


def test_copies_of_weights_drop_out_different_positions(worlds: Worlds) -> None:
    seeds = [seed for (seed,) in worlds.run(2, first_random_numbers, {"cp": 2})]
    assert len(set(seeds)) == 2


def first_random_numbers(layout: dict[str, Any]) -> tuple[float]:
    small_engine(layout)
    return (float(torch.rand(())),)
