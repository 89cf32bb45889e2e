"""One owner per folder: races, dead and silent owners, other hosts, requeued jobs, damaged files."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ConfigError
from megarl.run import owner
from megarl.run.owner import BEAT_S, SILENCE_S, RunLock, owned
from megarl.run.process_identity import Holder, lives, parse, read, start_of
from tests.refusals import refused

ROUNDS = 200


class Clock:
    """Time that passes only in `sleep`, in which others may act."""

    def __init__(self, meanwhile: Callable[[float], Any] = lambda time: None) -> None:
        self.time, self.meanwhile = 1_000_000.0, meanwhile

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.meanwhile(self.time)


def fail(message: str) -> None:
    raise AssertionError(message)


def lock(folder: Path, clock: Clock | None = None, **arguments: Any) -> RunLock:
    clock = clock or Clock()
    return RunLock(folder, **{"clock": clock, "sleep": clock.sleep, "environ": {}, "lost": fail, **arguments})


@pytest.fixture(autouse=True)
def _still_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests call `beat` themselves."""
    monkeypatch.setattr(RunLock, "_keep", lambda self, over: None)


def holder(folder: Path) -> Holder:
    (path,) = folder.glob(".owner-*.json")
    found, _ = read(path)
    assert found is not None
    return found


def assert_in_use(taker: RunLock, *holder: str) -> None:
    with refused(ConfigError, key=taker.key, value=taker.target, names=(taker.what, *holder)) as found:
        taker.take()
    assert found.error.where is None, "the folder itself is in order"
    assert not list(taker.folder.glob("*.tmp"))


# --- on one machine ---------------------------------------------------------------------------------------------------


def test_a_live_owner_is_named_and_its_folder_left_as_it_is(tmp_path: Path) -> None:
    first = lock(tmp_path)
    first.take()
    before = [(path.name, path.stat().st_mtime_ns, path.read_text()) for path in tmp_path.iterdir()]
    assert_in_use(lock(tmp_path), f"process {os.getpid()}", holder(tmp_path).host, "started 20")
    assert before == [(path.name, path.stat().st_mtime_ns, path.read_text()) for path in tmp_path.iterdir()]


def test_a_released_folder_is_taken_again_under_a_higher_number(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        one = lock(tmp_path)
        one.take()
        one.release()
        assert [path.name for path in tmp_path.iterdir()] == [f".owner-{number:07d}.json"]


@pytest.mark.parametrize("alive", [True, False])
def test_the_process_decides_on_the_same_machine_however_silent_it_is(alive: bool, tmp_path: Path) -> None:
    lock(tmp_path, pid=1234).take()
    late = Clock()
    late.time += 100 * SILENCE_S
    second = lock(tmp_path, late, pid=99, alive=lambda pid, started: alive)
    if alive:
        assert_in_use(second, "process 1234")
    else:
        second.take()
        assert holder(tmp_path).pid == 99
    assert late.time == Clock().time + 100 * SILENCE_S, "it did not wait"


def test_a_process_id_that_was_given_to_another_process_is_not_the_owner() -> None:
    start = start_of(os.getpid())
    assert start is not None
    assert lives(os.getpid(), start)
    assert lives(os.getpid(), None)
    assert not lives(os.getpid(), start - 1)


def test_a_killed_process_is_dead_before_its_parent_asks(tmp_path: Path) -> None:
    ready, child_ready = os.pipe()
    child = os.fork()
    if child == 0:
        lock(tmp_path).take()
        os.write(child_ready, b"1")
        signal.pause()
    os.read(ready, 1)
    assert_in_use(lock(tmp_path), f"process {child}")
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    lock(tmp_path).take()
    os.waitpid(child, 0)
    assert holder(tmp_path).pid == os.getpid()


def test_a_process_that_replaced_itself_holds_nothing(tmp_path: Path) -> None:
    lock(tmp_path).take()
    owner._held.clear()
    lock(tmp_path).take()
    assert holder(tmp_path).pid == os.getpid()


def test_a_copy_of_a_live_run_is_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lock(run, pid=1234).take()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / ".owner-0000001.json").write_bytes((run / ".owner-0000001.json").read_bytes())
    lock(copy, alive=lambda pid, started: True).take()
    moved = run.rename(tmp_path / "moved")
    assert_in_use(lock(moved, alive=lambda pid, started: True), "process 1234")


# --- on several machines ----------------------------------------------------------------------------------------------


def test_an_owner_on_another_host_that_refreshes_its_file_is_refused_at_its_next_beat(tmp_path: Path) -> None:
    first = lock(tmp_path, Clock(), host="one")
    first.take()

    def beats(time: float) -> None:
        if time > start + BEAT_S:
            first._clock = lambda: time
            first.beat()

    clock = Clock(beats)
    start = clock.time
    assert_in_use(lock(tmp_path, clock, host="two"), "host one", f"{SILENCE_S:g} s")
    assert clock.time < start + 2 * BEAT_S


def test_a_silent_owner_on_another_host_is_taken_over_after_the_stated_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock(tmp_path, host="one").take()
    clock = Clock()
    start = clock.time
    lock(tmp_path, clock, host="two").take()
    assert holder(tmp_path).host == "two"
    assert SILENCE_S <= clock.time - start <= SILENCE_S + 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"waiting for run.dir={tmp_path}: process")


def test_an_owner_long_silent_is_still_watched_for_a_few_beats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hosts that date files by their own clocks may be hours apart."""
    first = lock(tmp_path, host="one")
    first.take()

    def beats(time: float) -> None:
        if time > late.time - 0.5 and time > begin + BEAT_S:
            first._clock = lambda: time - 3600  # by its own clock
            first.beat()

    late = Clock(beats)
    late.time += 3600
    begin = late.time
    assert_in_use(lock(tmp_path, late, host="two"), "host one")
    late.meanwhile = lambda time: None
    begin = late.time
    lock(tmp_path, late, host="two").take()
    assert late.time - begin <= owner.WATCH_S + 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("field", ["boot", "namespace"])
def test_a_host_of_the_same_name_is_judged_by_its_heartbeat(field: str, tmp_path: Path) -> None:
    lock(tmp_path).take()
    other = dataclasses.replace(holder(tmp_path), id="other", **{field: 7})
    (tmp_path / ".owner-0000001.json").write_text(other.to_json())
    clock = Clock()
    lock(tmp_path, clock, alive=lambda pid, started: pytest.fail("its process ids mean nothing here")).take()
    assert clock.time > Clock().time + 10


def job(number: str, restart: int | None = None, cluster: str = "c") -> dict[str, str]:
    count = {} if restart is None else {"SLURM_RESTART_COUNT": str(restart)}
    return {"SLURM_JOB_ID": number, "SLURM_CLUSTER_NAME": cluster, **count}


@pytest.mark.parametrize(
    ("before", "after", "taken"),
    [
        (job("7"), job("7", 1), True),
        (job("7", 1), job("7", 2), True),
        (job("7", 2), job("7", 1), False),
        (job("7"), job("7"), False),
        (job("7"), job("8", 1), False),
        (job("7"), job("7", 1, "other"), False),
        ({}, job("7", 1), False),
    ],
)
@pytest.mark.parametrize("host", ["one", "two"])
def test_a_requeued_job_takes_its_folder_at_once(
    before: dict[str, str], after: dict[str, str], taken: bool, host: str, tmp_path: Path
) -> None:
    lock(tmp_path, host="one", environ=before).take()
    beats = iter(range(1, 1000))
    clock = Clock(lambda _: os.utime(tmp_path / ".owner-0000001.json", (next(beats), 0)))
    second = lock(tmp_path, clock, host=host, environ=after, alive=lambda pid, started: True, pid=99)
    if taken:
        second.take()
        assert clock.time == Clock().time
    else:
        assert_in_use(second)


# --- damaged files ----------------------------------------------------------------------------------------------------

SOUND = Holder("a", "h", 1, 1.0, None, None, "/", 1, None, 0, 1.0)
DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[1]",
    b'{"id": "x"}',
    b"[" * 100_000,
    b"9" * 5000,
    *(
        dataclasses.replace(SOUND, **change).to_json().encode()  # type: ignore[arg-type]
        for change in (
            *({"pid": pid} for pid in (-1, 0, 2**40, "1", True, None)),
            *({"since": since} for since in ("x", 1e300, float("nan"))),
            *({"host": 3}, {"started": "x"}, {"restart": None}, {"released": "no"}),
        )
    ),
]


def test_a_sound_file_is_read_as_it_was_written() -> None:
    assert parse(SOUND.to_json().encode()) == SOUND


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_taken_over_once_it_is_silent(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".owner-0000004.json"
    path.write_bytes(content)
    clock = Clock()
    os.utime(path, (clock.time, clock.time))
    lock(tmp_path, clock).take()
    assert clock.time >= Clock().time + SILENCE_S
    assert [path.name for path in tmp_path.iterdir()] == [".owner-0000005.json"]


def test_a_damaged_file_that_is_refreshed_has_an_owner(tmp_path: Path) -> None:
    path = tmp_path / ".owner-0000004.json"
    path.touch()
    beats = iter(range(1000))
    assert_in_use(lock(tmp_path, Clock(lambda _: os.utime(path, (next(beats), 0)))))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with refused(ConfigError, key="run.dir", value=str(tmp_path), where=str(tmp_path), names=("No space left",)):
        lock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", unsupported)
    first = lock(tmp_path)
    first.take()
    assert_in_use(lock(tmp_path))
    first.release()
    lock(tmp_path).take()


# --- holding ----------------------------------------------------------------------------------------------------------


def test_a_heartbeat_refreshes_the_file(tmp_path: Path) -> None:
    clock = Clock()
    one = lock(tmp_path, clock)
    one.take()
    clock.time += 3600
    one.beat()
    assert (tmp_path / ".owner-0000001.json").stat().st_mtime == clock.time


def test_an_owner_that_was_superseded_is_told_once_and_leaves_the_new_ones_file_alone(tmp_path: Path) -> None:
    told: list[str] = []
    sleeper = lock(tmp_path, host="one", lost=told.append)
    sleeper.take()
    lock(tmp_path, host="two").take()
    taken = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for _ in range(2):
        sleeper.beat()
    sleeper.release()
    assert len(told) == 1
    for name in (f"run.dir={tmp_path}", "process", "host two"):
        assert name in told[0]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == taken


def test_after_a_sleep_the_owner_looks_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    sleeper = lock(tmp_path, host="one", lost=told.append)
    sleeper.take()
    lock(tmp_path, host="two").take()
    sleeper.check()
    assert not told, "the thread has looked a moment ago"
    now = owner.time.time()
    monkeypatch.setattr(owner.time, "time", lambda: now + 1000)
    sleeper.check()
    assert told


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_file_that_was_deleted_or_damaged_is_put_back(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    one = lock(tmp_path)
    one.take()
    damage(tmp_path / ".owner-0000001.json")
    one.beat()
    assert holder(tmp_path).pid == os.getpid()
    assert_in_use(lock(tmp_path))


def test_the_thread_beats_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    beaten = threading.Event()
    monkeypatch.setattr(owner, "_LOOK_S", 0.001)
    monkeypatch.setattr(owner, "BEAT_S", 0.0)
    monkeypatch.setattr(RunLock, "_touch", lambda self, path: beaten.set() if path.suffix == ".json" else None)
    one = RunLock(tmp_path)
    one.take()
    assert beaten.wait(60)
    one.release()


def test_a_call_within_a_call_is_the_same_run_and_another_threads_is_not(tmp_path: Path) -> None:
    problems: list[Exception] = []

    def other() -> None:
        try:
            with owned(tmp_path, 1.0):
                pass
        except ConfigError as problem:
            problems.append(problem)

    with owned(tmp_path, 1.0) as outer:
        with owned(tmp_path, 1.0) as inner:
            assert inner is outer
        assert outer.number == 1
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(problems) == 1
    with owned(tmp_path, 1.0) as later:
        assert later.number == 2


def test_a_lock_beside_its_folder_leaves_the_folder_to_be_made(tmp_path: Path) -> None:
    one = lock(tmp_path / "model", key="export.hf", beside=True)
    one.take()
    assert_in_use(lock(tmp_path / "model", key="export.hf", beside=True))
    lock(tmp_path / "model2", key="export.hf", beside=True).take()
    assert not (tmp_path / "model").exists()


# --- races ------------------------------------------------------------------------------------------------------------


def rounds_won(folder: Path, barrier: Any, rounds: int, make: Callable[[Path], RunLock] = lock) -> list[int]:
    """Take every round's folder at the same moment as the other contenders; the rounds that were won."""
    won = []
    for number in range(rounds):
        one = make(folder / str(number))
        barrier.wait()
        with suppress(ConfigError):
            one.take()
            won.append(number)
    return won


def race(folder: Path, barrier: Any, wins: Any) -> None:
    """Report the rounds that this process won."""
    wins.put(rounds_won(folder, barrier, ROUNDS, lambda path: RunLock(path, environ={}, lost=fail)))
    barrier.wait()  # nobody dies while others still race


@pytest.mark.parametrize("left", ["nothing", "a dead owner"])
def test_of_processes_that_race_exactly_one_wins(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    if left == "a dead owner":
        for number in range(ROUNDS):
            lock(tmp_path / str(number), pid=2**31 - 1).take()
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(3), context.SimpleQueue()
    racers = [context.Process(target=race, args=(tmp_path, barrier, wins)) for _ in range(3)]
    for racer in racers:
        racer.start()
    won = sorted(number for _ in racers for number in wins.get())
    for racer in racers:
        racer.join()
    assert won == list(range(ROUNDS))
    for number in range(ROUNDS):
        assert holder(tmp_path / str(number)).pid in {racer.pid for racer in racers}


def test_of_threads_that_race_exactly_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    barrier = threading.Barrier(3)
    won: list[int] = []
    threads = [threading.Thread(target=lambda: won.extend(rounds_won(tmp_path, barrier, 50))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(50))


def test_a_number_that_was_cleared_away_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow process that saw number 1 dead takes number 2 after two others have come and gone."""
    lock(tmp_path, pid=2**31 - 1).take()
    real = RunLock._claim

    def slow(self: RunLock, number: int) -> bool:
        monkeypatch.setattr(RunLock, "_claim", real)
        lock(tmp_path, pid=2**31 - 1).take()
        lock(tmp_path, host="live", pid=1).take()
        assert [path.name for path in tmp_path.glob("*.json")] == [".owner-0000003.json"]
        return self._claim(number)

    monkeypatch.setattr(RunLock, "_claim", slow)
    assert_in_use(lock(tmp_path, host="live", alive=lambda pid, started: True, pid=2))
    assert holder(tmp_path).pid == 1
