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
    def of(cls, indices: Sequence[Tensor], counts: Sequence[Tensor], ids: Sequence[Tensor], total: int) -> TokenLists:
        """Return `total` lists from chunks.

        Args:
            indices: indices [n] of the lists in each chunk.
            counts: lengths [n] of the lists in each chunk.
            ids: the lists of each chunk, concatenated.
            total: number of lists. Those in no chunk are empty.
        """
        lengths = torch.zeros(total, dtype=torch.long)
        for index, count in zip(indices, counts, strict=True):
            lengths[index] = count
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        joined = torch.zeros(int(starts[-1]), dtype=torch.int32)
        for index, count, tokens in zip(indices, counts, ids, strict=True):
            joined[_entries(starts[index], count)] = tokens
        return cls(joined, starts)

    def to(self, device: torch.device) -> TokenLists:
        """Return these lists on a device."""
        return TokenLists(self.ids.to(device), self.starts.to(device))


@dataclass(frozen=True, eq=False)
class Choices:
    """The tokens that may be chosen at each position: the list with the index that `list_index` has there."""

    lists: TokenLists
    list_index: Tensor

    def restrict(self, logits: Tensor, rows: slice) -> Tensor:
        """Set the logits [rows, valid] of tokens that may not be chosen at these positions to FORBIDDEN, in place."""
        index = self.list_index[rows]
        first = self.lists.starts[index]
        count = self.lists.starts[index + 1] - first
        row = torch.repeat_interleave(torch.arange(len(index), device=logits.device), count)
        forbidden = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
        forbidden[row, self.lists.ids[_entries(first, count)].long()] = False
        return logits.masked_fill_(forbidden, FORBIDDEN)


def _entries(first: Tensor, count: Tensor) -> Tensor:
    """Return the concatenated indices of ranges that begin at `first` [n] and have `count` [n] entries."""
    ends = count.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=first.device)
    return within + torch.repeat_interleave(first - (ends - count), count)
