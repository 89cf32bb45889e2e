"""The host memory that a save of all optimizers' state takes."""

from types import SimpleNamespace
from typing import Any

import pytest

from megarl.parallel.all_optimizers import save_bytes, warn_of_save_memory


def engine_of(dp: int, *sizes: int, shared: int = 0) -> Any:
    """An engine with buffers of these sizes, and one of `shared` values of experts."""
    buffers, experts = ([SimpleNamespace(numel=size) for size in each] for each in (sizes, [shared] * (shared > 0)))
    chunk = SimpleNamespace(buffers=buffers, expert_parallel_buffers=experts)
    return SimpleNamespace(grid=SimpleNamespace(layout=SimpleNamespace(copies=dp)), chunks=[chunk], optimizer=object())


def test_a_save_takes_three_numbers_of_each_that_trains() -> None:
    assert save_bytes([engine_of(2, 100, 300), engine_of(2, 50)]) == 12 * 450 + 4 * 300
    assert save_bytes([engine_of(1, 100)]) == 12 * 100
    assert save_bytes([engine_of(2, 100, shared=500)]) == 12 * 600 + 4 * 500
    only_read = engine_of(2, 100)
    only_read.optimizer = None
    assert save_bytes([only_read]) == 0
    assert save_bytes([]) == 0


def test_saves_for_which_a_machine_has_no_room_are_told_of_before_the_first(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_save_memory(2**30, 8, 8 * 2**30)
    assert not caplog.messages
    warn_of_save_memory(2**30, 8, 7 * 2**30)
    (line,) = caplog.messages
    assert "8 GiB of host memory on this machine (8 ranks of 1.0 GiB), and 7 are free: use a larger parallel.tp" in line
