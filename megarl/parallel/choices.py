"""Restriction of the tokens that a policy may choose, at each position, to a list of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORBIDDEN = -1e30
"""Logit of a token that may not be chosen: its probability is exactly 0, and products with it stay finite."""


@dataclass(frozen=True, eq=False)
class TokenLists:
    """Lists of tokens of one vocabulary shard, concatenated.

    Attributes:
        ids: [total] int32 rows of the shard.
        starts: [lists + 1] long; list i is ids[starts[i]:starts[i + 1]].
    """

    ids: Tensor
    starts: Tensor

    @classmethod
    def of(cls, numbers: Sequence[Tensor], counts: Sequence[Tensor], ids: Sequence[Tensor], total: int) -> TokenLists:
        """Return `total` lists from chunks.

        Args:
            numbers: indices [n] of the lists in each chunk.
            counts: lengths [n] of the lists in each chunk.
            ids: the lists of each chunk, concatenated.
            total: number of lists. Those in no chunk are empty.
        """
        lengths = torch.zeros(total, dtype=torch.long)
        for number, count in zip(numbers, counts, strict=True):
            lengths[number] = count
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        joined = torch.zeros(int(starts[-1]), dtype=torch.int32)
        for number, count, part in zip(numbers, counts, ids, strict=True):
            joined[_entries(starts[number], count)] = part
        return cls(joined, starts)

    def to(self, device: torch.device) -> TokenLists:
        """Return these lists on a device."""
        return TokenLists(self.ids.to(device), self.starts.to(device))


@dataclass(frozen=True, eq=False)
class Choices:
    """The tokens that may be chosen at n positions: the lists with the indices `numbers` [n]."""

    lists: TokenLists
    numbers: Tensor

    def restrict(self, logits: Tensor, rows: slice) -> Tensor:
        """Set the logits [rows, valid] of tokens that may not be chosen at these positions to FORBIDDEN, in place."""
        number = self.numbers[rows]
        first = self.lists.starts[number]
        count = self.lists.starts[number + 1] - first
        row = torch.repeat_interleave(torch.arange(len(number), device=logits.device), count)
        forbidden = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
        forbidden[row, self.lists.ids[_entries(first, count)].long()] = False
        return logits.masked_fill_(forbidden, FORBIDDEN)


def _entries(first: Tensor, count: Tensor) -> Tensor:
    """Return the concatenated indices of ranges that begin at `first` [n] and have `count` [n] entries."""
    ends = count.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=first.device)
    return within + torch.repeat_interleave(first - (ends - count), count)
