"""Context parallelism: the ranks of a group compute different parts of the same sequences.

Time is cut into twice as many slices as there are ranks. Rank r has slice r and, counted from the end, slice r. Under a
causal mask the work of a slice grows with its place, so that all ranks have as much:

    slices of 3 ranks     0  1  2  3  4  5
    their ranks           0  1  2  2  1  0

Every rank has whole microbatches, and takes its slices where they enter a model. What a model returns is whole again,
so that losses and plans do not know of slices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TimeSlices:
    """The two slices of time of this rank, early and late; all of the time where a group has one rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    @property
    def multiple(self) -> int:
        """The number of slices, which divides the time."""
        return slices_of(self.size)

    def bounds(self, time: int) -> list[tuple[int, int]]:
        """Return the first position of each of this rank's slices and the one after its last."""
        if self.size == 1:
            return [(0, time)]
        length = time // self.multiple
        return [(place * length, (place + 1) * length) for place in (self.rank, self.multiple - 1 - self.rank)]

    def mine(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of values whose dimension `dim` is the time."""
        if self.size == 1:
            return values
        time = values.shape[dim]
        assert time % self.multiple == 0, f"{time} positions are not a multiple of {self.multiple}: the plan rounds up"
        return torch.cat([values.narrow(dim, begin, end - begin) for begin, end in self.bounds(time)], dim)

    def whole(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return the values of all positions on every rank, from each rank's part.

        Every rank computes the same loss from them, so that the gradient of a part is that of its own positions.
        """
        if self.size == 1:
            return values
        result: Tensor = _Gather.apply(values, self, dim, False)
        return result

    def shared(self, values: Tensor, dim: int) -> Tensor:
        """Return the values of all positions on every rank, each of which uses them for its own positions. The
        gradients of all ranks are summed."""
        if self.size == 1:
            return values
        result: Tensor = _Gather.apply(values, self, dim, True)
        return result

    def gathered(self, values: Tensor, dim: int) -> Tensor:
        """Return the values of all positions in order, without a gradient."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self.group)
        halves = [part.chunk(2, dim) for part in parts]
        return torch.cat([*(early for early, _ in halves), *(late for _, late in reversed(halves))], dim)

    def summed(self, values: Tensor, dim: int) -> Tensor:
        """Return this rank's part of the sum over ranks of values of all positions, without a gradient."""
        slices = values.chunk(self.multiple, dim)
        parts = torch.stack([torch.cat([slices[rank], slices[-1 - rank]], dim) for rank in range(self.size)])
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=self.group)
        return mine


def slices_of(ranks: int) -> int:
    """Return into how many slices the time of a bin is cut for so many ranks."""
    return 1 if ranks == 1 else 2 * ranks


class _Gather(torch.autograd.Function):
    """The values of all positions. The gradient of this rank's part is summed over ranks, or this rank's alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slices: TimeSlices, dim: int, summed: bool) -> Tensor:
        ctx.slices, ctx.dim, ctx.summed = slices, dim, summed
        return slices.gathered(values, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        part = ctx.slices.summed if ctx.summed else ctx.slices.mine
        return part(grads[0], ctx.dim), None, None, None
