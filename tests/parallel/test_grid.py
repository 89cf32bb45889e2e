"""A grid over the whole world, whether the world is there or not, leaves it as it was."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.config.compose import compose
from megarl.errors import ConfigError
from megarl.parallel.grid import grid_of_world
from tests.worlds import Worlds


def in_a_world(alone: bool, *settings: str) -> tuple[tuple[int, int], bool, bool]:
    """Sizes of the grid (dp, tp); then whether there still is a world, and a grid."""
    if alone:
        dist.destroy_process_group()
    config = compose("generate", ["parallel.timeout_s=60", *settings])[0]
    sizes = (0, 0)
    try:
        with grid_of_world(config) as grid:
            sizes = grid.layout.dp, grid.layout.tp
    except ConfigError:
        pass
    return sizes, dist.is_initialized(), parallel_state.is_initialized()


def in_one_that_fails() -> tuple[bool, bool]:
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="inside"), grid_of_world(compose("generate", [])[0]):
        raise ValueError("inside")
    return dist.is_initialized(), parallel_state.is_initialized()


def test_a_world_that_is_there_stays(worlds: Worlds) -> None:
    assert worlds.run(2, in_a_world, False) == [((2, 1), True, False)] * 2
    assert worlds.run(2, in_a_world, False, "parallel.tp=2") == [((1, 2), True, False)] * 2


def test_a_world_that_it_started_ends_with_it(worlds: Worlds) -> None:
    assert worlds.run(1, in_a_world, True) == [((1, 1), False, False)]
    assert worlds.run(1, in_a_world, True, "parallel.tp=2") == [((0, 0), False, False)], "a layout that does not fit"
    assert worlds.run(1, in_one_that_fails) == [(False, False)]
