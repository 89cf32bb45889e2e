"""Processes that form a world: what they answer, and what becomes of them when one fails."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megarl.errors import ConfigError
from megarl.parallel.grid import start_world
from megarl.parallel.worlds import WorldError, Worlds
from tests.refusals import refused


@pytest.fixture(scope="module")
def two() -> Iterator[Worlds]:
    worlds = Worlds(("torch",))
    yield worlds
    worlds.close()


def rank_and_sum(value: float) -> tuple[int, float, int]:
    start_world(60.0)
    values = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(values)
    return dist.get_rank(), float(values), os.getpid()


def refuse() -> None:
    raise ConfigError("model.depth=3 is odd", key="model.depth", value=3)


def fail_on_the_second() -> None:
    if int(os.environ["RANK"]) == 1:
        raise ValueError("a broken layer")
    time.sleep(600)


def end_on_the_second() -> None:
    if int(os.environ["RANK"]) == 1:
        os._exit(9)
    time.sleep(600)


def hang() -> None:
    time.sleep(600)


def test_the_processes_form_one_world_over_several_calls(two: Worlds) -> None:
    first, again = (two.call(2, 100.0, rank_and_sum, value) for value in (1.0, 2.0))
    assert first[:2] == (0, 3.0)
    assert again[:2] == (0, 6.0)
    assert first[2] == again[2]


def test_a_refusal_arrives_as_it_was_raised(two: Worlds) -> None:
    with refused(ConfigError, key="model.depth", value=3):
        two.call(2, 100.0, refuse)


@pytest.mark.parametrize(
    ("function", "limit_s", "said"),
    [(fail_on_the_second, 100.0, "a broken layer"), (end_on_the_second, 100.0, "rank 1"), (hang, 1.0, "1 s")],
)
def test_after_a_failure_the_next_call_has_new_processes(
    two: Worlds, function: object, limit_s: float, said: str
) -> None:
    with pytest.raises(WorldError, match=said):
        two.call(2, limit_s, function)  # type: ignore[arg-type]
    assert two.call(2, 100.0, rank_and_sum, 1.0)[:2] == (0, 3.0)
