"""What a trainer iterates over: for each step, the microbatches of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megarl.data.collate import Batch, batch_length, collate
from megarl.data.dataset import Rows
from megarl.data.order import TrainBatches, shard_rows


class StepLoader:
    """One list of microbatches per optimizer step, from a cursor that can be set to any step at once.

    Every microbatch of a step has the same length on all ranks.
    """

    def __init__(
        self,
        dataset: Rows,
        batches: TrainBatches,
        *,
        micro_batch_size: int,
        seq_length: int,
        pad_id: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        multiple_of: int = 1,
        steps: int | None = None,
    ) -> None:
        """Join rows with their order.

        Args:
            batches: the order; its `consumed` is the cursor.
            multiple_of: divides the length of every batch.
            steps: the step at which the stream ends, counted from the run's first (None: never).
        """
        shard_rows(batches.batch(batches.consumed), dp_rank, dp_size, micro_batch_size)  # refuse a bad size now
        self.dataset = dataset
        self.batches = batches
        self.micro_batch_size = micro_batch_size
        self.seq_length = seq_length
        self.pad_id = pad_id
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.multiple_of = multiple_of
        self.steps = steps

    @property
    def consumed(self) -> int:
        """Steps handed out so far; the next one has this number."""
        return self.batches.consumed

    def seek(self, consumed: int) -> None:
        """Go on with step number `consumed`, as if those before it had been handed out."""
        self.batches.consumed = consumed

    def step(self, index: int) -> list[Batch]:
        """This rank's microbatches of step `index`."""
        rows = self.batches.batch(index)
        length = batch_length(int(self.dataset.lengths[rows].max()), self.seq_length, self.multiple_of)
        shares = shard_rows(rows, self.dp_rank, self.dp_size, self.micro_batch_size)
        return [_collate_rows(self.dataset, share, length, self.pad_id) for share in shares]

    def __iter__(self) -> Iterator[list[Batch]]:
        while self.steps is None or self.consumed < self.steps:
            microbatches = self.step(self.consumed)
            self.batches.consumed += 1
            yield microbatches

    def __len__(self) -> int:
        """Steps of the whole run, those before the cursor included."""
        if self.steps is None:
            raise TypeError("a StepLoader without steps has no end")
        return self.steps


class EvalLoader:
    """Every row once, in order: lists of microbatches, as many on each rank.

    Where rows do not come out even, rows of padding fill up; their response_mask and length are 0.
    """

    def __init__(
        self,
        dataset: Rows,
        *,
        micro_batch_size: int,
        seq_length: int,
        pad_id: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        multiple_of: int = 1,
        microbatches: int = 1,
    ) -> None:
        """Join rows with their shares.

        Args:
            microbatches: length of each list, such as the number that fills a pipeline.
        """
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.seq_length = seq_length
        self.pad_id = pad_id
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.multiple_of = multiple_of
        self.rows_per_step = micro_batch_size * microbatches * dp_size

    def __iter__(self) -> Iterator[list[Batch]]:
        for begin in range(0, len(self.dataset), self.rows_per_step):
            rows = np.arange(begin, begin + self.rows_per_step)
            longest = int(self.dataset.lengths[rows[rows < len(self.dataset)]].max())
            length = batch_length(longest, self.seq_length, self.multiple_of)
            shares = shard_rows(rows, self.dp_rank, self.dp_size, self.micro_batch_size)
            yield [_collate_rows(self.dataset, share, length, self.pad_id) for share in shares]

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.rows_per_step)


def _collate_rows(dataset: Rows, rows: Sequence[int] | np.ndarray, length: int, pad_id: int) -> Batch:
    """Collate rows by number; a number past the end means a row of padding."""
    documents = [dataset.row(int(row)) if row < len(dataset) else () for row in rows]
    return collate(documents, length, pad_id, dataset.packed)
