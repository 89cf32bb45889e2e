"""Processes that read other data than the first one end in one line."""

from __future__ import annotations

import torch.distributed as dist

from megarl.data.agreement import refuse_different_data
from megarl.errors import DataError
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from tests.worlds import Worlds

ROWS = [[1, 2, 3], [4]]


def compare(read: list[tuple[list[list[int]], str]]) -> list[tuple[str | None, object] | None]:
    """Return for each case the key and the value of the error on this rank, or None where there is none."""
    grid = Grid(Layout.for_world(dist.get_world_size()), start_world())
    found: list[tuple[str | None, object] | None] = []
    try:
        for rows, kept in read:
            mine, kept_here = (rows, kept) if grid.rank else (ROWS, "texts")
            try:
                refuse_different_data(grid, mine, "data.train", kept=kept_here)
                found.append(None)
            except DataError as problem:
                found.append((problem.key, problem.value))
        return found
    finally:
        grid.close()


def test_other_rows_in_another_process_are_refused_in_every_process(worlds: Worlds) -> None:
    cases = [
        (ROWS, "texts"),
        ([[1, 2, 3]], "texts"),  # a row less
        ([[4], [1, 2, 3]], "texts"),  # another order
        ([[1, 2], [3, 4]], "texts"),  # the same tokens in other rows
        (ROWS, "other texts"),
        (ROWS, "texts"),  # and the group still works
    ]
    refused = ("data.train", [1])
    expected = [None, refused, refused, refused, refused, None]
    assert worlds.run(2, compare, cases) == [expected, expected]


def test_one_process_has_nothing_to_compare_with(worlds: Worlds) -> None:
    assert worlds.run(1, compare, [([[9]], "any")]) == [[None]]
