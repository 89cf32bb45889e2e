"""Plan the packing of rows for the forward passes of all replicas, and gather outputs back into rows.

    rows                     bins of 6 tokens, two of them for each microbatch

    0  a b c d .             bin 0   a b c | x y z       rows 0 and 1
    1  x y z .               bin 1   p q r s t -         row 2
    2  p q r s t .

The last token of a row (the dots) is predicted but not read, as no later token depends on it, unless `read_last`.

An encoder-decoder reads the prompts of a bin's rows in its encoder and their responses in its decoder. The decoder
starts at the last token of the prompt, which the model replaces by its start token (s):

    row  P Q R a b .         encoder   P Q R | X Y -
         X Y c d e .         decoder   s a b | s c d e
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.context import slices_of
from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.parallel.packing import pack, round_up_to_bucket, spread
from megarl.parallel.rows import Microbatch, ModelInputs, Origins, Rows, RowSource, gather, states_index

FEWER = (1.25, 1.5, 1.75, 2.0, 2.5)
"""By how much fewer bins than the fullest part needs are tried for an encoder-decoder, whose bins are then longer."""
LONGER = (1.0, 1.25, 1.5, 2.0)
"""Lengths of shared bins that are tried, as multiples of the longest unit: in a longer bin, less stays empty."""
EQUAL_WORK = 4096
"""Length of a sequence at which attention is as much work as the rest of a layer. It is that of a hidden size of 683,
and limits how long bins become: where no kernel skips what is masked, shared bins are attended to as one sequence, and
the memory of its scores grows with their length."""


@dataclass(frozen=True)
class _Shape:
    """The shape of a replica's microbatches: their number, and bins and tokens per bin of each. `members` are the units
    of each bin. With an encoder, `encoder_time` are the tokens that it reads, and `time` are those of the decoder."""

    count: int
    bins: int
    time: int
    members: list[np.ndarray]
    encoder_time: int = 0

    @property
    def work(self) -> float:
        """An estimate of the time that the microbatches take."""
        encoder, decoder = self.encoder_time, self.time  # each attends to itself, the decoder to the encoder too
        one = encoder * (1 + encoder / EQUAL_WORK) + decoder * (1 + (decoder + encoder) / EQUAL_WORK)
        return self.count * self.bins * one


class MicrobatchPlan:
    """Assign rows to bins, and bins to the microbatches of all replicas.

    Every rank computes the whole plan from the lengths alone and builds its own microbatches. All microbatches of all
    ranks have the same [bins, time]; surplus bins are empty.
    """

    def __init__(
        self,
        lengths: Tensor | np.ndarray | Sequence[int],
        layout: Layout,
        dp_rank: int,
        *,
        per_microbatch: int,
        share_bins: bool,
        keep_together: Tensor | np.ndarray | None = None,
        read_last: bool = False,
        longest: int | None = None,
        prompts: Tensor | np.ndarray | None = None,
    ) -> None:
        """
        Args:
            lengths: tokens of each row, [rows].
            per_microbatch: units of full length that a microbatch may hold. A unit is a row, or the rows that
                `keep_together` joins.
            share_bins: put several short units into one bin.
            keep_together: [rows], equal values mark rows that share a bin, one directly after the other (a pair, a
                group).
            read_last: read the last token of each row too, for a score of the whole row.
            longest: maximum length of any row of the data, which bounds the length of bins for one unit.
            prompts: tokens of each row's prompt, [rows], at least one, which an encoder reads; None without an encoder.
        """
        self.layout, self.dp_rank = layout, dp_rank
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.prompts = None if prompts is None else np.asarray(prompts, dtype=np.int64)
        # Number of a row's tokens before the first that is read, by the decoder if there is an encoder.
        self.skipped = np.zeros_like(self.lengths) if self.prompts is None else self.prompts - 1
        self.read = np.maximum(self.lengths - self.skipped - (0 if read_last else 1), 1)
        self.segmented = share_bins or keep_together is not None
        members = _members(len(self.lengths), keep_together)
        if self.prompts is None:
            sizes = np.array([self.read[rows].sum() for rows in members]) if keep_together is not None else self.read
            shapes = self._shapes(sizes, per_microbatch, share_bins, longest)
        else:
            both = np.stack([self.prompts, self.read], 1)
            pairs = np.array([both[rows].sum(0) for rows in members]) if keep_together is not None else both
            shapes = self._shapes_of_pairs(pairs, per_microbatch, share_bins)
        best = min(shapes, key=lambda shape: shape.work)
        self.count, self.bins, self.time, bins = best.count, best.bins, best.time, best.members
        self.encoder_time, self.first_unit = best.encoder_time, members[0]
        if keep_together is not None:
            bins = [np.concatenate([members[number] for number in one]) for one in bins]
        self._assign(bins)

    def _time(self, capacity: int, longest: int | None) -> int:
        """Return the length of bins for units of at most `capacity` tokens."""
        multiple_of = slices_of(self.layout.cp) * (self.layout.tp if self.layout.sequence_parallel else 1)
        time = round_up_to_bucket(capacity, multiple_of)
        return time if longest is None else min(time, -(-max(capacity, longest) // multiple_of) * multiple_of)

    def _shapes(self, sizes: np.ndarray, per_microbatch: int, share_bins: bool, longest: int | None) -> list[_Shape]:
        """Return the possible shapes for units of `sizes` tokens, [units]. The other arguments are those of
        `__init__`."""
        largest = int(sizes.max())
        times = {self._time(largest, longest): per_microbatch}  # and how many bins a microbatch may hold
        if share_bins:
            capacities = [math.ceil(factor * largest) for factor in LONGER]
            for capacity in capacities:
                time, most = self._time(capacity, None), per_microbatch * largest // capacity
                if most > times.get(time, 0):
                    times[time] = most
        singles = list(np.arange(len(sizes))[:, None])
        return [self._shape(pack(sizes, time) if share_bins else singles, time, most) for time, most in times.items()]

    def _shapes_of_pairs(self, pairs: np.ndarray, per_microbatch: int, share_bins: bool) -> list[_Shape]:
        """Return the possible shapes for units of [units, 2] tokens, those of the encoder and those of the decoder."""
        largest = pairs.max(0)
        needed = float((pairs.sum(0) / largest).max())  # bins as long as the longest unit, if they were full
        candidates = [list(np.arange(len(pairs))[:, None])]
        if share_bins:
            numbers = sorted({math.ceil(needed / factor) for factor in FEWER})
            candidates += [spread(pairs, number) for number in numbers]
        shapes = []
        for members in candidates:
            fullest = np.array([pairs[units].sum(0) for units in members]).max(0)
            encoder_time, time = (self._time(int(tokens), None) for tokens in fullest)
            most = int(per_microbatch * largest.sum() // fullest.sum())
            if most:
                shapes.append(self._shape(members, time, most, encoder_time))
        return shapes

    def _shape(self, members: list[np.ndarray], time: int, most: int, encoder_time: int = 0) -> _Shape:
        """Return the shape for these units of each bin, if a microbatch holds at most `most` bins."""
        layout = self.layout
        count = -(-len(members) // (layout.dp * most))
        if layout.vpp > 1:  # an interleaved pipeline needs a multiple of pp microbatches
            count = -(-count // layout.pp) * layout.pp
        bins = min(most, round_up_to_bucket(-(-len(members) // (layout.dp * count)), steps=16))
        return _Shape(count, bins, time, members, encoder_time)

    def _assign(self, bins: Sequence[np.ndarray]) -> None:
        """Compute for each row its bin, the position of its first token in the bin, and its segment there, from 1."""
        order = np.concatenate(bins)  # rows, bin by bin
        rows_in_bin = np.array([len(rows) for rows in bins])
        first = np.repeat(np.cumsum(rows_in_bin) - rows_in_bin, rows_in_bin)  # index in `order` of a bin's first row
        begins = np.cumsum(self.read[order]) - self.read[order]
        self.row_bin, self.row_start, self.row_segment, self.prompt_start = np.zeros((4, len(order)), dtype=np.int64)
        self.row_bin[order] = np.repeat(np.arange(len(bins)), rows_in_bin)
        self.row_start[order] = begins - begins[first]
        self.row_segment[order] = np.arange(len(order)) - first + 1
        if self.prompts is not None:
            begins = np.cumsum(self.prompts[order]) - self.prompts[order]
            self.prompt_start[order] = begins - begins[first]

    def microbatches(self, source: RowSource, indices: Tensor | None = None) -> list[Microbatch]:
        """Build this replica's microbatches. Bins are assigned round-robin: `bins` consecutive ones per replica.

        Args:
            source: contains the planned rows.
            indices: [rows], their indices in the source (None: it contains only these rows, in order).
        """
        firsts = (self.bins * (turn * self.layout.dp + self.dp_rank) for turn in range(self.count))
        return [self._microbatch(source, indices, first) for first in firsts]

    def _microbatch(self, source: RowSource, indices: Tensor | None, first: int) -> Microbatch:
        """Lay out the rows of `self.bins` bins, from bin `first` on."""
        members = np.flatnonzero((self.row_bin >= first) & (self.row_bin < first + self.bins))
        idle = len(members) == 0
        if idle:  # empty bins, but losses expect rows: use a unit whose mask is empty
            members = self.first_unit
        taken = torch.from_numpy(members)
        rows = source.take(taken if indices is None else indices[taken])
        if idle:
            rows = _as_filler(rows)
        read = np.zeros_like(members) if idle else self.read[members]
        width = rows.tokens.shape[1]

        # For each token that is read: its row here, its offset in the row, and its position in the flat bins.
        row = np.repeat(np.arange(len(members)), read)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(read) - read, read)
        position = torch.from_numpy(self._begins(members, first)[row] + offset)
        in_row = self.skipped[members][row] + offset
        token = torch.from_numpy(row * width + in_row)
        is_followed = torch.from_numpy(in_row + 1 < self.lengths[members][row])
        target = token + is_followed

        def lay_out(values: Tensor, padding: int = 0) -> Tensor:
            bins = values.new_full((self.bins * self.time, *values.shape[1:]), padding)
            bins[position] = values
            return bins.view(self.bins, self.time, *values.shape[1:])

        routes = lay_out(rows["routes"].flatten(0, 1)[token], -1) if "routes" in rows else None
        segments = torch.from_numpy(self.row_segment[members][row]) if self.segmented else None
        if "segment_ids" in rows:
            assert segments is None, "rows that hold documents have bins to themselves"
            segments = rows["segment_ids"].flatten()[token]
        positions = rows["positions"].flatten()[token] if "positions" in rows else torch.from_numpy(offset)
        return Microbatch(
            tokens=lay_out(rows.tokens.flatten()[token]),
            positions=lay_out(positions),
            segment_ids=None if segments is None else lay_out(segments),
            encoder=None if self.prompts is None else self._encoder(rows, members, first, idle),
            origins=Origins(lay_out(torch.from_numpy(row + 1)), float(self.read.sum()), self.layout.copies, routes),
            targets=lay_out(rows.tokens.flatten()[target] * is_followed),
            target_mask=lay_out(rows.action_mask.flatten()[target] * is_followed),
            rows=rows,
            token_index=torch.full(rows.tokens.shape, -1) if idle else self._token_index(members, first, width),
            last_index=torch.full((len(rows),), -1) if idle else self._last_index(members, first),
        )

    def _encoder(self, rows: Rows, members: np.ndarray, first: int, idle: bool) -> ModelInputs:
        """Lay out the prompts of the rows of `self.bins` bins, from bin `first` on, for the encoder."""
        assert self.prompts is not None
        read = np.zeros_like(members) if idle else self.prompts[members]
        row = np.repeat(np.arange(len(members)), read)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(read) - read, read)
        begins = (self.row_bin[members] - first) * self.encoder_time + self.prompt_start[members]
        position = torch.from_numpy(begins[row] + offset)

        def lay_out(values: Tensor) -> Tensor:
            bins = values.new_zeros(self.bins * self.encoder_time)
            bins[position] = values
            return bins.view(self.bins, self.encoder_time)

        return ModelInputs(
            tokens=lay_out(rows.tokens.flatten()[torch.from_numpy(row * rows.tokens.shape[1] + offset)]),
            positions=lay_out(torch.from_numpy(offset)),
            segment_ids=lay_out(torch.from_numpy(self.row_segment[members][row])),
        )

    def _begins(self, members: np.ndarray, first: int) -> np.ndarray:
        """Return [members], the index of each row's first token in the flat bins from bin `first` on."""
        begins: np.ndarray = (self.row_bin[members] - first) * self.time + self.row_start[members]
        return begins

    def _token_index(self, members: np.ndarray, first: int, width: int) -> Tensor:
        """Return [members, width], index in the flat bins from `first` on of each token's predicting state, or -1."""
        offset = np.arange(width) - self.skipped[members][:, None]
        is_target = (offset > 0) & (offset < (self.lengths - self.skipped)[members][:, None])
        return torch.from_numpy(np.where(is_target, self._begins(members, first)[:, None] + offset - 1, -1))

    def _last_index(self, members: np.ndarray, first: int) -> Tensor:
        """Return [members], the index of each row's last token in the flat bins from bin `first` on; -1 if not read."""
        lengths = (self.lengths - self.skipped)[members]
        is_read = (lengths > 0) & (self.read[members] >= lengths)
        return torch.from_numpy(np.where(is_read, self._begins(members, first) + lengths - 1, -1))

    def collect(self, outputs: Sequence[Tensor], grid: Grid, width: int) -> Tensor:
        """Gather all replicas' outputs [bins, time] into rows [rows, width] in host memory, on every rank, as
        `Microbatch.gather_rows` does for one microbatch."""
        return gather(self._all_bins(outputs, grid), self._token_index(np.arange(len(self.lengths)), 0, width))

    def collect_states(self, outputs: Sequence[Tensor], grid: Grid, width: int) -> Tensor:
        """Gather all replicas' outputs [bins, time] into rows [rows, width] in host memory, on every rank, as
        `Microbatch.gather_states` does for one microbatch."""
        rows = np.arange(len(self.lengths))
        index = states_index(
            self._token_index(rows, 0, width), self._last_index(rows, 0), torch.from_numpy(self.lengths)
        )
        return gather(self._all_bins(outputs, grid), index)

    def _all_bins(self, outputs: Sequence[Tensor], grid: Grid) -> Tensor:
        """Gather all bins of all replicas in plan order, [all bins, time]: the plan assigned them round-robin."""
        local = torch.stack(list(outputs)).contiguous()  # [microbatches, bins, time]
        shares = [local]
        if self.layout.dp > 1:
            shares = [torch.empty_like(local) for _ in range(self.layout.dp)]
            dist.all_gather(shares, local, group=grid.groups.dp)
        return torch.stack(shares, dim=1).flatten(0, 2).cpu()


def _members(rows: int, keep_together: Tensor | np.ndarray | None) -> list[np.ndarray]:
    """Return the rows of each unit; units are in the order of their first rows."""
    if keep_together is None:
        return list(np.arange(rows)[:, None])
    by_unit: dict[int, list[int]] = {}
    for row, number in enumerate(np.asarray(keep_together).tolist()):
        by_unit.setdefault(number, []).append(row)
    return [np.array(members) for members in by_unit.values()]


def _as_filler(rows: Rows) -> Rows:
    """Return filler rows: length 0 and an empty action mask."""
    return replace(rows, lengths=torch.zeros_like(rows.lengths), action_mask=torch.zeros_like(rows.action_mask))


class ReadsRows(Protocol):
    """What plans read of an engine: its processes, and whether an encoder reads the prompts."""

    grid: Grid

    @property
    def has_encoder(self) -> bool:
        """Whether the model is an encoder-decoder."""


def plan_rows(
    lengths: Tensor | np.ndarray,
    engine: ReadsRows,
    *,
    per_microbatch: int,
    share_bins: bool,
    keep_together: Tensor | None = None,
    read_last: bool = False,
    longest: int | None = None,
    prompts: Tensor | None = None,
) -> MicrobatchPlan:
    """Return the plan for the passes of an engine over rows of these lengths. `prompts` matter to an encoder alone;
    the other arguments are those of `MicrobatchPlan`."""
    grid = engine.grid
    return MicrobatchPlan(
        lengths,
        grid.layout,
        grid.dp_rank,
        per_microbatch=per_microbatch,
        share_bins=share_bins,
        keep_together=keep_together,
        read_last=read_last,
        longest=longest,
        prompts=prompts if engine.has_encoder else None,
    )


def make_microbatches(source: RowSource, indices: Tensor, engine: ReadsRows, **options: Any) -> list[Microbatch]:
    """Plan the rows of a source with indices [rows], and build this replica's microbatches of them. `options` are those
    of `plan_rows`."""
    lengths = np.asarray(source.lengths)[indices.numpy()]
    if not engine.has_encoder:
        return plan_rows(lengths, engine, **options).microbatches(source, indices)
    rows = source.take(indices)
    return plan_rows(lengths, engine, **options, prompts=rows.prompts).microbatches(rows)
