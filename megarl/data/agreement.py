"""All processes read the same data, or the run ends before it starts."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megarl.errors import DataError
from megarl.parallel.grid import Grid
from megarl.parallel.shards import refused_once


def refuse_different_data(grid: Grid, rows: Iterable[Sequence[int] | np.ndarray], name: str, kept: Any = None) -> None:
    """Compare what this process read with what the first one read.

    Files may differ between machines, and a function may return other records in each process. Without this check every
    rank would train on its own rows under the same row numbers.

    Args:
        rows: token ids of each row, in order.
        name: the configuration key of the data.
        kept: other plain values that the run uses of the rows.
    """
    if grid.layout.world_size == 1:
        return
    count, digest = 0, zlib.crc32(repr(kept).encode())
    for row in rows:
        content = np.asarray(row, dtype=np.int32)
        digest = zlib.crc32(content.tobytes(), zlib.crc32(len(content).to_bytes(8, "little"), digest))
        count += 1
    read = grid.gather((count, digest))
    refused_once(grid, lambda: _compare(read, name))


def _compare(read: Sequence[tuple[int, int]], name: str) -> None:
    """Refuse a process whose (number of rows, digest) is not that of process 0."""
    others = [rank for rank, found in enumerate(read) if found != read[0]]
    if others:
        raise DataError(
            f"{name}: process {others[0]} read other rows ({read[others[0]][0]}) than process 0 ({read[0][0]}): give "
            "every machine the same files, and seed what a function draws at random",
            key=name,
            value=others,
        )
