"""A notice to one rank stops all of them after the same step, with a checkpoint that goes on as if nothing happened."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from megarl.callbacks.checkpoints import Checkpoints
from megarl.callbacks.preemption import NOTICES, STATUS_FILE, Preemption
from megarl.checkpoint import find, verify
from megarl.command import INTERRUPTED, NOTICED
from tests.tiny_runs import run_tiny
from tests.worlds import Worlds

SPARSE = {"every": 100, "save_last": False, "best": {"keep": 0}}


def noticed(run_dir: Path, steps: int, at: int, number: int, rank: int) -> dict[str, Any]:
    """A run in which one rank is sent a signal in the middle of a step (that has `at` steps before it)."""
    status = run_dir / "status"
    os.environ[STATUS_FILE] = str(status)
    before = [signal.getsignal(n) for n in NOTICES]

    def send(step: int) -> None:
        if step == at and dist.get_rank() == rank:
            os.kill(os.getpid(), number)

    made: list[Any] = []

    def watch(checkpoints: Checkpoints) -> list[Callback]:
        made.append(Preemption(checkpoints))
        return made

    ended = run_tiny(run_dir, steps, each_step=send, more_callbacks=watch, **SPARSE)
    ended["outcome"] = made[0].outcome
    after = [signal.getsignal(n) for n in NOTICES]
    return {**ended, "handlers_as_before": before == after, "status": status.read_text() if status.exists() else None}


def by_hand_too(run_dir: Path, steps: int, at: int, number: int, rank: int) -> dict[str, Any]:
    """`noticed` where Ctrl-C is heard, also by tests that run in a shell's background."""
    with answering(signal.SIGINT, signal.default_int_handler):
        return noticed(run_dir, steps, at, number, rank)


@contextmanager
def answering(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", NOTICES)
@pytest.mark.parametrize("rank", [0, 1])
def test_any_ranks_notice_stops_all_after_that_step_with_a_checkpoint(
    number: int, rank: int, worlds: Worlds, tmp_path: Path
) -> None:
    ended = worlds.run(2, by_hand_too, tmp_path, 9, 3, number, rank)
    assert [one["step"] for one in ended] == [4, 4]
    assert [path.name for path in find(tmp_path / "checkpoints")] == ["step-0000004"]
    assert verify(find(tmp_path / "checkpoints")[0]) is None
    by_hand = number == signal.SIGINT
    assert ended[0]["status"] == (None if by_hand else "stopped after step 4: start again\n")
    assert [one["outcome"] for one in ended] == [INTERRUPTED if by_hand else NOTICED] * 2
    assert all(one["handlers_as_before"] for one in ended)


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGUSR1, True), (signal.SIGINT, False)])
def test_only_a_ctrl_c_that_the_shell_ignores_stays_ignored(
    number: int, stops: bool, worlds: Worlds, tmp_path: Path
) -> None:
    """Launchers start torchrun with SIGUSR1 ignored, so that it reaches the processes alone."""
    assert worlds.run(1, with_signals_ignored, tmp_path, number)[0] == (4 if stops else 9)


def with_signals_ignored(run_dir: Path, number: int) -> int:
    with answering(signal.SIGUSR1, signal.SIG_IGN), answering(signal.SIGINT, signal.SIG_IGN):
        return int(noticed(run_dir, 9, 3, number, 0)["step"])


def test_the_next_start_ends_in_the_unbroken_runs_weights(worlds: Worlds, tmp_path: Path) -> None:
    unbroken = worlds.run(2, run_tiny, tmp_path / "unbroken", 6)[0]
    worlds.run(2, noticed, tmp_path / "broken", 6, 2, signal.SIGUSR1, 1)
    ended = worlds.run(2, run_tiny, tmp_path / "broken", 6)[0]
    assert ended["step"] == 6
    assert torch.equal(ended["weight"], unbroken["weight"])


def test_a_run_that_was_at_its_end_is_not_started_again(worlds: Worlds, tmp_path: Path) -> None:
    (ended,) = worlds.run(1, noticed, tmp_path, 4, 3, signal.SIGUSR1, 0)
    assert (ended["step"], ended["status"], ended["outcome"]) == (4, None, 0)


def test_without_a_notice_nothing_stops(worlds: Worlds, tmp_path: Path) -> None:
    (ended,) = worlds.run(1, noticed, tmp_path, 4, -1, signal.SIGUSR1, 0)
    assert (ended["step"], ended["status"]) == (4, None)
    assert not find(tmp_path / "checkpoints")


def evaluated(run_dir: Path, eval_every: int, at: int) -> list[str]:
    """A run that is noticed in the middle of a step: the checkpoints it leaves, best ones included."""

    def send(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGUSR1)

    run_tiny(
        run_dir,
        9,
        evals={4: 0.5},  # an evaluation after any other step is a KeyError
        eval_every=eval_every,
        each_step=send,
        more_callbacks=lambda checkpoints: [Preemption(checkpoints)],
        every=100,
    )
    return [path.name for path in find(run_dir / "checkpoints")]


@pytest.mark.parametrize(("eval_every", "at"), [(4, 2), (4, 3), (100, 3)])
def test_a_stopped_run_evaluates_only_where_that_was_due(
    eval_every: int, at: int, worlds: Worlds, tmp_path: Path
) -> None:
    assert worlds.run(1, evaluated, tmp_path, eval_every, at)[0] == [f"step-{at + 1:07d}"]


def test_a_second_interrupt_stops_at_once(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds.run(1, interrupted_twice, tmp_path)[0] == ([0, 1, 2], [])


def interrupted_twice(run_dir: Path) -> tuple[list[int], list[Path]]:
    """The steps begun by a run with two interrupts in its third, and its checkpoints."""
    begun: list[int] = []

    def send(step: int) -> None:
        begun.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with (
        answering(signal.SIGINT, signal.default_int_handler),
        pytest.raises(SystemExit),
    ):  # Lightning's answer to KeyboardInterrupt
        run_tiny(run_dir, 9, each_step=send, more_callbacks=lambda found: [Preemption(found)], **SPARSE)
    return begun, find(run_dir / "checkpoints")
