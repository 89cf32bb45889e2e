"""Heartbeats say where each rank is, and from them the rank that the others wait for is named."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarl import why_stuck
from megarl.callbacks.heartbeat import HeartbeatCallback, whereabouts
from megarl.errors import ConfigError
from megarl.heartbeat import Heartbeat, HeartbeatFile, diagnose, read
from tests.refusals import refused
from tests.tiny_runs import run_tiny
from tests.worlds import Worlds

NOW = 1000.0


def ranks(count: int, **same: Any) -> list[Heartbeat]:
    """A world in which everybody waits in one collective since 100 s, and beats."""
    long_ago = {"since": NOW - 100, "still": NOW - 90}
    told = {"phase": "train", "step": 7, "alive": NOW - 1, "collective": "all_reduce", **long_ago, **same}
    return [Heartbeat(rank, count, f"node{rank}", 100 + rank, **told) for rank in range(count)]


def changed(heartbeats: list[Heartbeat], rank: int, **other: Any) -> list[Heartbeat]:
    return [replace(heartbeat, **other) if heartbeat.rank == rank else heartbeat for heartbeat in heartbeats]


def test_a_rank_without_a_sign_of_life_is_named_with_its_phase_and_who_waits() -> None:
    verdict = diagnose(changed(ranks(4), 2, alive=NOW - 60, phase="generate"), NOW)
    assert verdict.ranks == (2,)
    assert "rank 2 (node2, process 102)" in verdict.sentence
    assert "generate of step 7" in verdict.sentence
    assert "3 of 4 ranks wait for it in train of step 7, in all_reduce" in verdict.sentence


def test_a_rank_in_an_earlier_phase_is_named() -> None:
    late = changed(ranks(4), 1, phase="score", since=NOW - 400, collective="", at="rewards/client.py:20 wait")
    verdict = diagnose(late, NOW)
    assert verdict.ranks == (1,)
    assert "score of step 7 for 400 s, at rewards/client.py:20 wait" in verdict.sentence
    assert diagnose(changed(ranks(4), 3, step=6), NOW).ranks == (3,)


def test_a_rank_at_work_while_the_others_wait_in_a_collective_is_named() -> None:
    assert diagnose(changed(ranks(4), 3, collective=""), NOW).ranks == (3,)


def test_the_first_that_failed_is_named_and_not_those_that_fell_with_it() -> None:
    fallen = changed(ranks(3), 0, ended="RuntimeError: connection closed by peer", alive=NOW - 5)
    fallen = changed(fallen, 1, ended="RewardError: no answer", alive=NOW - 9)
    verdict = diagnose(fallen, NOW)
    assert verdict.ranks == (1,)
    assert "RewardError: no answer" in verdict.sentence


def test_a_rank_that_never_came_is_named() -> None:
    verdict = diagnose(ranks(4)[:3], NOW)
    assert verdict.ranks == (3,)
    assert "never started" in verdict.sentence


@pytest.mark.parametrize(
    ("heartbeats", "says"),
    [
        (ranks(2, since=NOW - 2), "the run makes progress"),
        (ranks(2), "none is found to block"),
        (changed(ranks(2, still=NOW - 2), 1, collective=""), "none is found to block"),
        (ranks(2, ended="finished"), "has finished"),
        (ranks(2, alive=NOW - 90), "no rank has written a heartbeat for 90 s"),
    ],
)
def test_nobody_is_named_where_nobody_is_to_blame(heartbeats: list[Heartbeat], says: str) -> None:
    verdict = diagnose(heartbeats, NOW)
    assert verdict.ranks == ()
    assert says in verdict.sentence


def test_ranks_of_an_earlier_larger_world_are_not_waited_for(tmp_path: Path) -> None:
    for heartbeat in [*ranks(2), *changed(ranks(4, alive=NOW - 9000), 3)[2:]]:
        HeartbeatFile(tmp_path, heartbeat.rank).write(heartbeat)
    assert [heartbeat.rank for heartbeat in read(tmp_path)] == [0, 1]


def test_a_long_message_of_failure_still_makes_a_heartbeat(tmp_path: Path) -> None:
    HeartbeatFile(tmp_path, 0).write(replace(ranks(1)[0], ended="x" * 5000))
    (heartbeat,) = read(tmp_path)
    assert heartbeat.ended == "x" * 200


def test_what_a_heartbeat_says_neither_steers_the_terminal_nor_ends_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HeartbeatFile(tmp_path, 0).write(replace(ranks(1)[0], host="\ud800[/red]\x1b[2J", ended="RuntimeError \udfff"))
    assert why_stuck.run([str(tmp_path)]) == 0
    said = capsys.readouterr().out.encode().decode()
    assert "\x1b" not in said
    assert "\\ud800[/red]\\x1b[2J" in said.replace("\n", "")


def test_whereabouts_name_the_collective_that_was_called_and_the_line_that_called_it(
    worlds: Worlds, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"

    def waits_for_rank_1() -> tuple[str, str]:
        if dist.get_rank() == 1:
            while not seen.exists():
                time.sleep(0.01)
            dist.all_gather_object([None, None], 1)
            return whereabouts(sys._getframe())
        watched, told = threading.get_ident(), []

        def look() -> None:
            while not told or not told[-1][0]:
                told.append(whereabouts(sys._current_frames()[watched]))
            seen.touch()

        looking = threading.Thread(target=look)
        looking.start()
        dist.all_gather_object([None, None], 1)
        looking.join()
        return told[-1]

    waiting, at_work = worlds.run(2, waits_for_rank_1)
    assert waiting[0] == "all_gather_object"
    assert re.match(r"(tests/test_why_stuck\.py|tests\.test_why_stuck):\d+ waits_for_rank_1$", waiting[1])
    assert at_work[0] == ""


def test_code_without_a_file_is_named_by_its_module() -> None:
    """As of a function that was pickled by value, in a notebook say."""
    there: dict[str, Any] = {"__name__": "my_rewards", "sys": sys, "whereabouts": whereabouts}
    exec(compile("def score():\n    return whereabouts(sys._getframe())", "<dynamic-code>", "exec"), there)
    assert there["score"]() == ("", "my_rewards:2 score")


def stops_itself(run_dir: Path, phase: str) -> dict[str, Any]:
    """A run whose rank 1 is stopped, as by SIGSTOP, at its third step inside that phase."""

    class Stop(HeartbeatCallback):
        def _enter(self, name: str) -> None:
            super()._enter(name)
            if dist.get_rank() == 1 and name == phase and self.heartbeat.step == 2:
                os.kill(os.getpid(), signal.SIGSTOP)

    heartbeats = Stop(run_dir, beat_s=0.1)
    step = Stepper()
    return run_tiny(run_dir, 4, each_step=step, more_callbacks=lambda _: [heartbeats, step.bound(heartbeats)], every=2)


class Stepper:
    """The tiny module has no phases of its own: this brackets its steps, as real modules do."""

    def __init__(self) -> None:
        self.enter: Callable[[str], None] = lambda name: None

    def bound(self, heartbeats: HeartbeatCallback) -> HeartbeatCallback:
        self.enter = heartbeats._enter
        return heartbeats

    def __call__(self, step: int) -> None:
        self.enter("train")


@pytest.mark.gate  # signs of life are a matter of seconds, which a busy machine has not
@pytest.mark.parametrize("phase", ["train", "save"])
def test_a_stopped_rank_is_named_in_the_phase_it_stopped_in(
    phase: str, worlds: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = threading.Thread(target=lambda: worlds.run(2, stops_itself, tmp_path, phase))
    runs.start()
    try:
        deadline = time.monotonic() + 60
        while why_stuck_or_none(tmp_path) != 0:
            assert time.monotonic() < deadline, capsys.readouterr().out
            assert runs.is_alive()
            time.sleep(0.1)
    finally:
        for heartbeat in read(tmp_path):
            os.kill(heartbeat.pid, signal.SIGCONT)
        runs.join()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("rank 1 (")
    assert f"last in {phase} of step 2" in said
    assert "1 of 2 ranks wait for it" in said
    assert diagnose(read(tmp_path), time.time()).sentence == "the run has finished"


def why_stuck_or_none(run_dir: Path) -> int | None:
    try:
        return why_stuck.run([str(run_dir), "beat=0.2"])
    except ConfigError:  # not started yet
        return None


def test_a_folder_without_breadcrumbs_is_one_clear_line(tmp_path: Path) -> None:
    with refused(ConfigError, where=str(tmp_path), names=("breadcrumbs",)):
        why_stuck.run([str(tmp_path)])


@pytest.mark.parametrize(("rank", "world"), [(0, 2**62), (3, 2), (-1, 2), (0, 0)])
def test_a_rank_or_a_world_that_cannot_be_is_passed_over(rank: int, world: int, tmp_path: Path) -> None:
    (tmp_path / "breadcrumbs").mkdir()
    beat = {"rank": rank, "world": world, "host": "h", "pid": 1}
    (tmp_path / "breadcrumbs" / "rank-0.json").write_text(json.dumps(beat))
    assert read(tmp_path) == []
    (tmp_path / "breadcrumbs" / "rank-0.json").write_text(json.dumps({**beat, "rank": 0, "world": 2}))
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize(
    "content", ["{", "[1]", "[" * 100_000, '{"rank": "a", "world": 1, "host": "h", "pid": 1}', "1" * 5000]
)
def test_a_heartbeat_that_cannot_be_read_is_passed_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "breadcrumbs").mkdir()
    (tmp_path / "breadcrumbs" / "rank-0.json").write_text(content)
    assert read(tmp_path) == []
    assert read(tmp_path / ("a" * 300)) == []
