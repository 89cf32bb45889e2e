import time

import pytest

from megarl.clock import Clock
from tests.callbacks.tiny import Ticks


@pytest.fixture
def times() -> tuple[Ticks, Ticks]:
    return Ticks(), Ticks()


def test_inner_part_takes_its_time_from_the_outer_one(times):
    wall, cpu = times
    clock = Clock(wall, cpu)
    with clock.part("train"):
        wall.pass_(1)
        with clock.part("checkpoint"):
            wall.pass_(10)
            cpu.pass_(4)
        wall.pass_(2)
        cpu.pass_(0.5)
    assert clock.totals() == {
        "train": {"wall_s": 3.0, "cpu_s": 0.5},
        "checkpoint": {"wall_s": 10.0, "cpu_s": 4.0},
    }


def test_time_outside_parts_is_not_counted_and_parts_add_up(times):
    wall, cpu = times
    clock = Clock(wall, cpu)
    for _ in range(3):
        wall.pass_(100)
        with clock.part("train"):
            wall.pass_(2)
    assert clock.totals()["train"]["wall_s"] == 6.0


def test_open_part_is_counted_up_to_now(times):
    wall, cpu = times
    clock = Clock(wall, cpu)
    with clock.part("train"):
        wall.pass_(2)
        assert clock.totals()["train"]["wall_s"] == 2.0
        wall.pass_(3)
    assert clock.totals()["train"]["wall_s"] == 5.0


def test_a_part_that_fails_is_closed(times):
    wall, cpu = times
    clock = Clock(wall, cpu)

    def fail() -> None:
        with clock.part("train"):
            wall.pass_(2)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    wall.pass_(50)
    with clock.part("eval"):
        wall.pass_(1)
    assert {name: part["wall_s"] for name, part in clock.totals().items()} == {"train": 2.0, "eval": 1.0}


def test_totals_continue_over_a_resume_and_are_counted_once(times):
    wall, cpu = times
    first = Clock(wall, cpu)
    with first.part("train"):
        wall.pass_(5)
    second = Clock(wall, cpu)
    with second.part("setup"):
        wall.pass_(1)
    second.load_state_dict(first.state_dict())
    second.load_state_dict(first.state_dict())
    with second.part("train"):
        wall.pass_(2)
    assert {name: part["wall_s"] for name, part in second.totals().items()} == {"train": 7.0, "setup": 1.0}


def test_reads_wall_and_cpu_time_of_this_process():
    clock = Clock()
    with clock.part("sleep"):
        time.sleep(0.05)
    total = clock.totals()["sleep"]
    assert total["wall_s"] >= 0.05
    assert total["cpu_s"] < total["wall_s"]


def test_a_listener_hears_every_change_of_the_innermost_part():
    clock, heard = Clock(), []
    clock.listen(heard.append)
    with clock.part("train"), clock.part("save"):
        pass
    assert heard == ["train", "save", "train", ""]
