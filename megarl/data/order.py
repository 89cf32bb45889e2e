"""Which rows make up which global batch.

Global batch k is a function of (seed, k) and the data alone: no state runs along, and no layout is known.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megarl.errors import ConfigError

GROUPING_WINDOW = 32
"""Global batches whose rows are sorted by length together; more saves padding, less mixes better."""


class TrainBatches:
    """The endless stream of global batches.

    Epochs follow each other without a gap: each holds every row once, in an order of its own, and the
    stream is cut every `global_batch_size` rows. So a batch may begin in one epoch and end in the next, and
    no row is lost.

    Attributes:
        consumed: global batches handed out so far, which is the whole state.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = False,
        start: int = 0,
        rows: int | None = None,
    ) -> None:
        """Take up the stream.

        Args:
            lengths: tokens of each row, [rows].
            group_by_length: fill a batch with rows of similar length; needs shuffle.
            start: the global batch to begin with.
            rows: rows that the batches before it took, where those had another size (None: this size).
        """
        if len(lengths) == 0 or global_batch_size < 1:
            raise ConfigError(
                f"trainer.global_batch_size={global_batch_size} cannot be drawn from {len(lengths)} rows; "
                "both must be at least 1",
                key="trainer.global_batch_size",
                value=global_batch_size,
            )
        if group_by_length and not shuffle:
            raise ConfigError(
                "data.group_by_length=true reorders rows, which data.shuffle=false forbids; change one",
                key="data.group_by_length",
                value=True,
            )
        self.lengths = np.asarray(lengths)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.consumed = start
        self._origin = 0 if rows is None else rows - start * global_batch_size  # where batch 0 would begin
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, index: int) -> np.ndarray:
        """Rows of a global batch, [global_batch_size], found without going through those before it."""
        return self.rows(self._origin + index * self.global_batch_size, self.global_batch_size)

    def rows(self, begin: int, count: int) -> np.ndarray:
        """Rows [count] of the stream from its row `begin` on."""
        end = begin + count
        total = len(self.lengths)
        pieces = []
        while begin < end:
            epoch, offset = divmod(begin, total)
            piece = self._order(epoch)[offset : offset + end - begin]
            pieces.append(piece)
            begin += len(piece)
        return np.concatenate(pieces)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A batch touches at most two epochs, unless it is larger than the data; older orders are let go.
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        total = len(self.lengths)
        if not self.shuffle:
            return np.arange(total)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(total)
        if not self.group_by_length:
            return order
        # The first rows complete the batch that the last epoch began; grouping starts at a batch's edge.
        size = self.global_batch_size
        head = min((self._origin - epoch * total) % size, total)
        whole = (total - head) // size
        groups = order[head : head + whole * size]
        for begin in range(0, len(groups), GROUPING_WINDOW * size):
            window = groups[begin : begin + GROUPING_WINDOW * size]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        groups[:] = groups.reshape(whole, size)[generator.permutation(whole)].reshape(-1)
        return order


class TrainLoader:
    """Yield the row indices of each step, from `batches.consumed` on.

    All ranks get the same; `MicrobatchPlan` splits them.
    """

    def __init__(self, batches: TrainBatches, steps: int | None = None) -> None:
        """`steps` is the step at which the stream ends, counted from the run's first (None: never)."""
        self.batches, self.steps = batches, steps

    def __iter__(self) -> Iterator[Tensor]:
        while self.steps is None or self.batches.consumed < self.steps:
            indices = torch.as_tensor(self.batches.batch(self.batches.consumed))
            self.batches.consumed += 1
            yield indices

    def __len__(self) -> int:
        """Steps of the whole run, those before the cursor included."""
        if self.steps is None:
            raise TypeError("a loader without steps has no end")
        return self.steps


class EvalLoader:
    """Yield each row index once: in order, or mixed, in a random order that is always the same.

    Mixed steps have at least `rows_per_step` rows each, if there are that many.
    """

    def __init__(self, rows: int, rows_per_step: int, *, mixed: bool = False) -> None:
        if mixed:
            order = torch.from_numpy(np.random.default_rng(0).permutation(rows))
            self.steps = order.tensor_split(max(1, rows // rows_per_step))
        else:
            self.steps = torch.arange(rows).split(rows_per_step)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)
