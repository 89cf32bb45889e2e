"""Rows laid out for the forward passes of all replicas, and outputs brought back to rows.

    rows                     bins of 6 places, two of them for each microbatch

    0  a b c d .             bin 0   a b c | x y z       rows 0 and 1
    1  x y z .               bin 1   p q r s t -         row 2
    2  p q r s t .

The last token of a row (the dots) is predicted and not read, as nothing follows from it, unless `read_last`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.parallel.packing import pack, round_up_to_bucket
from megarl.parallel.rows import Microbatch, Rows, RowSource, gather

SHORT = 32
"""Rows up to this long share bins twice as long as the longest, so that less of a bin stays empty."""


class MicrobatchPlan:
    """Which row is read where, in which microbatch of which replica.

    Every rank computes the whole plan, from lengths alone, and makes its own microbatches. All microbatches of all
    ranks have the same [bins, time]; bins that are left over hold nothing.
    """

    def __init__(
        self,
        lengths: Tensor | np.ndarray,
        layout: Layout,
        dp_rank: int,
        *,
        per_microbatch: int,
        share_bins: bool,
        unit: Tensor | np.ndarray | None = None,
        read_last: bool = False,
    ) -> None:
        """
        Args:
            lengths: tokens of each row, [rows].
            per_microbatch: units of full length that a microbatch may hold; without `unit`, every row is one.
            share_bins: put several short units into one bin.
            unit: [rows], a number for each row. Rows with the same number are never parted: they are read one after
                the other in one bin.
            read_last: read the last token of each row too, where a score of the whole row lies on it.
        """
        self.layout, self.dp_rank = layout, dp_rank
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.read = np.maximum(self.lengths - (0 if read_last else 1), 1)
        self.segmented = share_bins or unit is not None
        members = _members(len(self.lengths), unit)
        sizes = np.array([self.read[rows].sum() for rows in members]) if unit is not None else self.read
        longest = int(sizes.max())
        capacity = 2 * longest if share_bins and longest <= SHORT else longest
        self.time = round_up_to_bucket(capacity, layout.tp if layout.sequence_parallel else 1)
        bins = pack(sizes, self.time) if share_bins else list(np.arange(len(members))[:, None])
        most = max(1, per_microbatch * longest // capacity)
        count = -(-len(bins) // (layout.dp * most))
        if layout.vpp > 1:  # an interleaved pipeline works in rounds of a microbatch per stage
            count = -(-count // layout.pp) * layout.pp
        self.count = count
        self.bins = min(most, round_up_to_bucket(-(-len(bins) // (layout.dp * count)), steps=16))
        self.first_unit = members[0]
        self._place(bins if unit is None else [np.concatenate([members[number] for number in one]) for one in bins])

    def _place(self, bins: Sequence[np.ndarray]) -> None:
        """Compute where each row begins, and which token of which row is read at each place of each bin.

        `row_bin`, `row_start` [rows]: the bin of a row and the place of its first token in it.
        `place_row`, `place_offset` [bins, time]: the row that is read at a place (-1: padding) and the token's offset
        in it. `segment_ids` [bins, time]: 1, 2, ... for the rows of a bin.
        """
        order = np.concatenate(bins)  # rows, bin by bin
        rows_in_bin = np.array([len(rows) for rows in bins])
        first = np.repeat(np.cumsum(rows_in_bin) - rows_in_bin, rows_in_bin)  # index in `order` of a bin's first row
        ends = np.cumsum(self.read[order])
        begins = ends - self.read[order]
        bin_of, start_of = np.repeat(np.arange(len(bins)), rows_in_bin), begins - begins[first]
        self.row_bin, self.row_start = np.zeros((2, len(order)), dtype=np.int64)
        self.row_bin[order], self.row_start[order] = bin_of, start_of

        # For each token that is read, bin by bin: the index of its row in `order`, and its offset in the row.
        at = np.repeat(np.arange(len(order)), self.read[order])
        offset = np.arange(len(at)) - begins[at]
        places = bin_of[at], start_of[at] + offset
        shape = (self.layout.dp * self.count * self.bins, self.time)
        self.place_row = np.full(shape, -1, dtype=np.int64)
        self.place_offset, self.segment_ids = np.zeros((2, *shape), dtype=np.int64)
        self.place_row[places], self.place_offset[places] = order[at], offset
        self.segment_ids[places] = at - first[at] + 1

    def microbatches(self, source: RowSource, numbers: Tensor | None = None) -> list[Microbatch]:
        """Make this replica's microbatches.

        Bins are dealt out in rounds, `bins` of them to each replica.

        Args:
            source: where the planned rows are.
            numbers: [rows], their numbers in the source (None: it holds just these, in order).
        """
        stride = self.layout.dp * self.bins
        firsts = range(self.dp_rank * self.bins, len(self.place_row), stride)
        return [self._microbatch(source, numbers, first) for first in firsts]

    def _microbatch(self, source: RowSource, numbers: Tensor | None, first: int) -> Microbatch:
        stop = first + self.bins
        members = np.flatnonzero((self.row_bin >= first) & (self.row_bin < stop))
        idle = len(members) == 0
        if idle:  # its bins hold nothing, but losses want rows: a unit that counts for nothing
            members = self.first_unit
        taken = torch.from_numpy(members)
        rows = source.take(taken if numbers is None else numbers[taken])
        if idle:
            rows = _without_effect(rows)
        width = rows.tokens.shape[1]
        place_row, offset = self.place_row[first:stop], torch.from_numpy(self.place_offset[first:stop])
        inside = torch.from_numpy(place_row >= 0)
        # Index of each place's row among those of this microbatch; in padding, any.
        row = torch.from_numpy(np.searchsorted(members, place_row).clip(max=len(members) - 1))
        here = row * width + offset.clamp(max=width - 1)
        predicts = inside & (offset + 1 < rows.lengths[row])
        after = here + predicts

        def read(column: Tensor) -> Tensor:
            return column.flatten()[here] * inside

        return Microbatch(
            tokens=read(rows.tokens),
            positions=read(rows["positions"]) if "positions" in rows else offset * inside,
            segment_ids=self._segments(rows, read, first, stop),
            targets=rows.tokens.flatten()[after] * predicts,
            target_mask=rows.action_mask.flatten()[after] * predicts,
            rows=rows,
            token_index=torch.full(rows.tokens.shape, -1) if idle else self._token_index(members, first, width),
            last_index=torch.full((len(rows),), -1) if idle else self._last_index(members, first),
        )

    def _segments(self, rows: Rows, read: Callable[[Tensor], Tensor], first: int, stop: int) -> Tensor | None:
        """[bins, time]: the rows that share a bin, or the documents that a row holds."""
        if "segment_ids" in rows:
            assert not self.segmented, "rows that hold documents have bins to themselves"
            return read(rows["segment_ids"])
        return torch.from_numpy(self.segment_ids[first:stop]) if self.segmented else None

    def _token_index(self, members: np.ndarray, first: int, width: int) -> Tensor:
        """[members, width]: where the state that predicts each token is in the flat bins from `first` on, or -1."""
        begin = (self.row_bin[members] - first) * self.time + self.row_start[members]
        offset = np.arange(width)
        predicted = (offset > 0) & (offset < self.lengths[members][:, None])
        return torch.from_numpy(np.where(predicted, begin[:, None] + offset - 1, -1))

    def _last_index(self, members: np.ndarray, first: int) -> Tensor:
        """[members]: where each row's last token is in the flat bins from `first` on, or -1 where it is not read."""
        begin = (self.row_bin[members] - first) * self.time + self.row_start[members]
        is_read = self.read[members] >= self.lengths[members]
        return torch.from_numpy(np.where(is_read, begin + self.lengths[members] - 1, -1))

    def collect(self, outputs: Sequence[Tensor], grid: Grid, width: int) -> Tensor:
        """Bring the outputs [bins, time] of all replicas' microbatches into rows: [rows, width] on every rank's host,
        as `Microbatch.gather_rows` has them."""
        return gather(self._everywhere(outputs, grid), self._token_index(np.arange(len(self.lengths)), 0, width))

    def collect_last(self, outputs: Sequence[Tensor], grid: Grid) -> Tensor:
        """Return what the outputs hold where each row's last token was read: [rows] on every rank's host."""
        return gather(self._everywhere(outputs, grid), self._last_index(np.arange(len(self.lengths)), 0))

    def _everywhere(self, outputs: Sequence[Tensor], grid: Grid) -> Tensor:
        """[all bins in their order, time]: they were dealt out in rounds."""
        local = torch.stack(list(outputs)).contiguous()  # [microbatches, bins, time]
        shares = [local]
        if self.layout.dp > 1:
            shares = [torch.empty_like(local) for _ in range(self.layout.dp)]
            dist.all_gather(shares, local, group=grid.groups.dp)
        return torch.stack(shares, dim=1).flatten(0, 2).cpu()


def _members(rows: int, unit: Tensor | np.ndarray | None) -> list[np.ndarray]:
    """The rows of each unit, units in the order in which they begin."""
    if unit is None:
        return list(np.arange(rows)[:, None])
    by_unit: dict[int, list[int]] = {}
    for row, number in enumerate(np.asarray(unit).tolist()):
        by_unit.setdefault(number, []).append(row)
    return [np.array(members) for members in by_unit.values()]


def _without_effect(rows: Rows) -> Rows:
    """The rows with no length and no token that counts."""
    return replace(rows, lengths=torch.zeros_like(rows.lengths), action_mask=torch.zeros_like(rows.action_mask))


def make_microbatches(
    source: RowSource, numbers: Tensor, grid: Grid, *, per_microbatch: int, share_bins: bool
) -> list[Microbatch]:
    """Plan some rows of a source, by their numbers [rows], and make this replica's microbatches of them."""
    lengths = np.asarray(source.lengths)[numbers.numpy()]
    plan = MicrobatchPlan(lengths, grid.layout, grid.dp_rank, per_microbatch=per_microbatch, share_bins=share_bins)
    return plan.microbatches(source, numbers)
