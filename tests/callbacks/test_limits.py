"""A run that reaches its time limit stops at a step's edge with a checkpoint, and goes on as if it had not stopped."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.callbacks import limits
from megarl.callbacks.limits import StepLimit, TimeLimit, parse_duration
from megarl.checkpoint import find, verify
from tests.callbacks.tiny import SaveAt, Ticks, Tiny, train
from tests.tiny_runs import run_tiny
from tests.worlds import Worlds


def limited(run_dir: Path, steps: int, seconds_per_step: list[float], limit: float, **settings: Any) -> dict[str, Any]:
    """A run in which steps take that long by each rank's clock; with `evaluated`, the steps of its evaluations."""
    clock, evaluated = Ticks(), []

    class Scores(dict[int, float]):
        def __missing__(self, step: int) -> float:
            evaluated.append(step)
            return 1.0

    real, limits.time = limits.time, SimpleNamespace(monotonic=clock)  # type: ignore[assignment]
    try:
        ended = run_tiny(
            run_dir,
            steps,
            evals=Scores(),
            each_step=lambda step: clock.pass_(seconds_per_step[dist.get_rank()]),
            more_callbacks=lambda checkpoints: [TimeLimit(timedelta(seconds=limit), checkpoints)],
            **settings,
        )
    finally:
        limits.time = real
    return {**ended, "evaluated": evaluated}


def saved(run_dir: Path) -> list[str]:
    return [path.name for path in find(run_dir / "checkpoints")]


SPARSE = {"every": 100, "save_last": False, "best": {"keep": 0}}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_stops_at_the_first_edge_past_the_limit_with_a_checkpoint(
    asynchronous: bool, worlds: Worlds, tmp_path: Path
) -> None:
    """Steps of 10 s against a limit of 35 s: the fourth ends past it."""
    ended = worlds.run(1, limited, tmp_path, 9, [10.0], 35.0, **SPARSE, async_save=asynchronous)[0]
    assert ended["step"] == 4
    assert saved(tmp_path) == ["step-0000004"]
    assert verify(find(tmp_path / "checkpoints")[0]) is None


def test_without_reaching_the_limit_nothing_is_added(worlds: Worlds, tmp_path: Path) -> None:
    ended = worlds.run(1, limited, tmp_path, 3, [10.0], 35.0, **SPARSE)[0]
    assert ended["step"] == 3
    assert saved(tmp_path) == []


def test_each_process_has_the_whole_limit_and_the_end_is_that_of_an_unbroken_run(
    worlds: Worlds, tmp_path: Path
) -> None:
    unbroken = worlds.run(1, run_tiny, tmp_path / "unbroken", 9)[0]
    stops = [worlds.run(1, limited, tmp_path / "limited", 9, [10.0], 35.0, **SPARSE)[0] for _ in range(3)]
    assert [ended["step"] for ended in stops] == [4, 8, 9]
    assert torch.equal(stops[-1]["weight"], unbroken["weight"])
    assert stops[-1]["consumed"] == 9


def test_the_first_ranks_clock_decides_for_all(worlds: Worlds, tmp_path: Path) -> None:
    ended = worlds.run(2, limited, tmp_path, 9, [10.0, 30.0], 35.0, **SPARSE)
    assert [rank["step"] for rank in ended] == [4, 4]
    assert saved(tmp_path) == ["step-0000004"]


def test_evaluations_keep_their_steps_over_a_stop(worlds: Worlds, tmp_path: Path) -> None:
    first, second = (
        worlds.run(1, limited, tmp_path, 9, [10.0], limit, eval_every=3, **SPARSE)[0] for limit in (35.0, 1e9)
    )
    assert first["evaluated"][0] == 3
    assert second["evaluated"] == [6, 9]


def test_durations_may_be_longer_than_a_day() -> None:
    assert parse_duration("100:01:30") == timedelta(hours=100, seconds=90)


class Phases(Tiny):
    """A step is a phase of three optimizer steps, and the module says how many there will be."""

    unit = "phase"

    def __init__(self, planned: int) -> None:
        super().__init__([1.0] * 100)
        self.planned, self.steps_done = planned, 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for _ in range(3):
            self.optimizers().step()
        self.steps_done += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["consumed"] = self.steps_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps_done = checkpoint["consumed"]


def test_phases_are_counted_by_the_module_and_not_by_the_optimizer() -> None:
    module = Phases(planned=4)
    trainer = train(module, [StepLimit()], steps=-1)
    assert (module.steps_done, trainer.global_step) == (4, 12)


def test_a_resumed_run_does_the_phases_that_are_left_and_a_finished_one_none(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    train(Phases(planned=2), [StepLimit(), SaveAt(6, saved)], steps=-1)
    longer, done = Phases(planned=5), Phases(planned=2)
    trainer = train(longer, [StepLimit()], steps=-1, resume=saved)
    assert (longer.steps_done, trainer.global_step) == (5, 15)
    trainer = train(done, [StepLimit()], steps=-1, resume=saved)
    assert (done.steps_done, trainer.global_step) == (2, 6)


def test_a_module_without_a_plan_is_left_to_lightning() -> None:
    assert train(Tiny([1.0] * 4), [StepLimit()], steps=3).global_step == 3
