"""Rows of documents in, right-padded tensors of one length out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.data.formats import Document

Batch = dict[str, Tensor]

MAX_LENGTHS = 32
SHORTEST_STEP = 16


def batch_length(longest: int, seq_length: int, multiple_of: int = 1) -> int:
    """The length that a batch is padded to: `longest` rounded up, at most `seq_length`.

    Lengths come in steps, so that a run meets at most `MAX_LENGTHS` different shapes.

    Args:
        longest: tokens of the longest row of the global batch, so that all ranks and microbatches agree.
        multiple_of: a number that divides every length; `seq_length` is a multiple of it.
    """
    step = _round_up(max(SHORTEST_STEP, _round_up(seq_length, MAX_LENGTHS) // MAX_LENGTHS), multiple_of)
    return min(seq_length, _round_up(max(longest, 1), step))


def collate(rows: Sequence[Sequence[Document]], length: int, pad_id: int, packed: bool = False) -> Batch:
    """One microbatch; a row without documents becomes padding that is never trained on.

    Args:
        rows: documents of each row, at most `length` tokens together.
        packed: add `segment_ids` and restart the positions at each document.

    Returns:
        tokens [batch, time] long; positions [batch, time] long; response_mask [batch, time] float32;
        lengths [batch] long, tokens of each row without padding; if packed, segment_ids [batch, time] long,
        1, 2, ... for the documents of a row and 0 for its padding.
    """
    shape = (len(rows), length)
    tokens = torch.full(shape, pad_id, dtype=torch.long)
    positions = torch.arange(length).repeat(len(rows), 1)
    response_mask = torch.zeros(shape, dtype=torch.float32)
    segment_ids = torch.zeros(shape, dtype=torch.long)
    lengths = torch.zeros(len(rows), dtype=torch.long)
    for index, documents in enumerate(rows):
        begin = 0
        for segment, document in enumerate(documents, 1):
            end = begin + len(document)
            tokens[index, begin:end] = torch.from_numpy(document.tokens)
            response_mask[index, begin:end] = torch.from_numpy(document.response_mask)
            segment_ids[index, begin:end] = segment
            if packed:
                positions[index, begin:] = torch.arange(length - begin)
            begin = end
        if packed:
            positions[index, begin:] = torch.arange(length - begin)
        lengths[index] = begin
    batch = {"tokens": tokens, "positions": positions, "response_mask": response_mask, "lengths": lengths}
    return {**batch, "segment_ids": segment_ids} if packed else batch


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
