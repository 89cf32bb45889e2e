"""The lock of a run folder, on local and shared file systems. A dead or silent owner loses it.

The owner is the process that wrote the owner file with the highest number, such as `.owner-0000007.json`. A process
takes over by creating the file of the next number, exclusively and with its full content. A thread of the owner
refreshes the file's modification time. A process may take over if the owner on the same machine is dead, or if an owner
on another machine did not refresh its file for `SILENCE_S`.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from megarl.command import say
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.parallel.meeting import first_does
from megarl.run.process_identity import Holder, lives, read, this_process

BEAT_S = 5.0  # seconds between two refreshes of the owner file
SILENCE_S = 120.0  # seconds after which an owner on another machine counts as dead
WATCH_S = 3 * BEAT_S  # minimum seconds for which its file is watched before
_LOOK_S = 1.0
_held: set[str] = set()  # ids of this process's locks
log = get_logger(__name__)


class RunLock:
    """The lock of one folder. Call `take` before anything is written there and `release` after everything is."""

    def __init__(
        self,
        target: Path,
        *,
        key: str = "run.dir",
        beside: bool = False,
        host: str | None = None,
        pid: int | None = None,
        environ: Mapping[str, str] = os.environ,
        alive: Callable[[int, float | None], bool] = lives,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Any] = time.sleep,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            target: the folder to own.
            key: configuration key of the folder, for messages.
            beside: put the lock's files beside the folder, which must not exist before it is complete.
            host, pid: of the owner; default: this process.
            environ: environment variables, which name the SLURM job.
            alive: returns whether the process with an id and a start time still runs on this machine.
            clock: returns the time in seconds; default: the monotonic clock, and the file server's for files.
            sleep: waits for some seconds.
            lost: called when another owner has taken the folder over; default: end this process at once.
        """
        self.what, self.key, self.target = f"{key}={target}", key, str(target)
        self.folder = target.absolute().parent if beside else target.absolute()
        self.name = f"{target.name}.owner" if beside else "owner"
        self._host, self._pid, self._environ = host, pid, environ
        self._alive, self._clock, self._sleep = alive, clock, sleep
        self._lost = _end if lost is None else lost
        self._turn = threading.Lock()  # the thread and the callback may check at the same time
        self.number: int | None = None  # number of our file while we are the owner
        self._looked = 0.0

    def take(self) -> None:
        """Become the owner. Raise a `ConfigError` if another process is."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._me = this_process(self.folder, self._host, self._pid, self._environ)
            self._process, self._over = os.getpid(), threading.Event()
            self._mine = self.folder / f".{self.name}-{self._me.id}.tmp"
            _held.add(self._me.id)  # before the file exists, as other threads read it
            try:
                _write(self._mine, self._me)
                self._become(self._take())
            finally:
                self._mine.unlink(missing_ok=True)
                if self.number is None:
                    _held.discard(self._me.id)
        except OSError as problem:
            raise ConfigError(
                f"{self.what} cannot be written ({problem.strerror or problem}): set {self.key} to another path",
                key=self.key,
                value=self.target,
                where=self.target,
            ) from None

    def beat(self) -> None:
        """Refresh the owner file, or find out that another process has taken over."""
        with self._turn:
            if self.number is None:
                return
            self._looked = time.time()
            try:
                number, path = self._highest()
                holder = None if path is None else read(path)[0]
                if path is not None and holder is not None and holder.id == self._me.id:
                    self._touch(path)
                    return
                if number <= self.number and (holder is None or holder.released):
                    self._put(self._me, self.number)  # the file was deleted or damaged
                    return
            except OSError as problem:  # a file server that does not respond for a while
                log.debug("%s: %s", self.folder, problem)
                return
            self.number = None
        self._lost(
            f"{self.what} was taken over by {holder or 'another run'}, because this run had not refreshed "
            f"its lock for {SILENCE_S:g} s: this run ends, so that the two do not mix; its checkpoints are kept"
        )

    def check(self) -> None:
        """Check that the folder is still ours if the thread has not checked for a while, as after this host slept."""
        if self.number is not None and abs(time.time() - self._looked) > 1.5 * BEAT_S:
            self.beat()

    def release(self) -> None:
        """Release the folder. The file stays, marked as released, so that numbers only rise."""
        if self.number is None or os.getpid() != self._process:
            return  # a forked child holds no lock
        self._over.set()
        with self._turn:
            number, self.number = self.number, None
            if number is None:
                return
            _held.discard(self._me.id)
            with contextlib.suppress(OSError):
                if self._highest()[0] == number:
                    self._put(replace(self._me, released=True), number)

    # --- taking -----------------------------------------------------------------------------------------------------

    def _take(self) -> int:
        """Create our owner file and return its number. Waits to find out whether a silent owner is dead."""
        watched: Path | None = None
        since, reported = 0.0, False
        while True:
            number, path = self._highest()
            is_alive: bool | None = False
            if path is not None:
                try:
                    holder, refreshed = read(path)
                except FileNotFoundError:
                    continue  # removed by the owner of a higher number
                is_alive = self._is_alive(holder)
                if is_alive:
                    raise self._refusal(holder)
            if is_alive is None:
                here = self._here()
                if watched != path:
                    watched, since, refreshed_at_first = path, here, refreshed
                if refreshed != refreshed_at_first:
                    raise self._refusal(holder, foreign=True)
                # Hosts may date files by their own clocks, so the file's age alone proves nothing until it was watched.
                silent = max(self._now() - refreshed, here - since)
                if here - since < WATCH_S or silent < SILENCE_S:
                    if not reported and here - since > 2 * BEAT_S and silent < SILENCE_S:
                        reported = True
                        self._report_wait(holder, silent)
                    self._sleep(_LOOK_S)
                    continue
            if self._claim(number + 1):
                return number + 1

    def _is_alive(self, holder: Holder | None) -> bool | None:
        """Return whether the owner is alive; None if only its refreshes can show that."""
        me = self._me
        if holder is None:
            return None
        requeued = holder.job is not None and holder.job == me.job and holder.restart < me.restart
        if holder.released or requeued:
            return False
        if holder.machine != me.machine:
            return None
        if holder.pid == os.getpid() == me.pid and holder.started == me.started:
            return holder.id in _held  # a process that replaced itself by exec holds no lock
        copied = holder.folder != me.folder and holder.inode != me.inode
        return not copied and self._alive(holder.pid, holder.started)

    def _claim(self, number: int) -> bool:
        """Create the owner file of a number. Return False if another process was faster."""
        path = self._path(number)
        try:
            os.link(self._mine, path)
        except FileExistsError:
            if not path.exists() or not path.samefile(self._mine):  # otherwise a file server repeated our own request
                return False
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links: exclusive, but not atomic
            try:
                _write(path, self._me)
            except FileExistsError:
                return False
        if self._highest()[0] == number:
            return True
        path.unlink(missing_ok=True)  # others took and removed the numbers in between meanwhile
        return False

    def _become(self, number: int) -> None:
        self.number, self._looked = number, time.time()
        now = self._now()
        for path in list(self.folder.iterdir()):
            found = self._number(path.name)
            with contextlib.suppress(OSError):
                # A process that died while it took the folder left a candidate that is not refreshed.
                candidate = path.name.startswith(f".{self.name}-") and path.suffix == ".tmp"
                left = candidate and now - path.stat().st_mtime > SILENCE_S
                if left or (found is not None and found < number):
                    path.unlink()
        threading.Thread(target=self._keep, args=(self._over,), name="run lock", daemon=True).start()

    def _refusal(self, holder: Holder | None, *, foreign: bool = False) -> ConfigError:
        far = f" (can be taken over once it has not refreshed its lock for {SILENCE_S:g} s)" if foreign else ""
        return ConfigError(
            f"{self.what} is in use by {holder or 'another run'}{far}: "
            f"set another {self.key}, or wait for that run or stop it",
            key=self.key,
            value=self.target,
        )

    def _report_wait(self, holder: Holder | None, silent: float) -> None:
        say(
            f"waiting for {self.what}: {holder or 'its unknown owner'} has not refreshed its lock for "
            f"{silent:.0f} s, and counts as dead after {SILENCE_S:g} s"
        )

    # --- holding ----------------------------------------------------------------------------------------------------

    def _keep(self, over: threading.Event) -> None:
        # Short waits, as a thread's wait does not count the time for which its host sleeps.
        while not over.wait(_LOOK_S):
            if abs(time.time() - self._looked) >= BEAT_S:
                self.beat()

    def _put(self, holder: Holder, number: int) -> None:
        """Replace our owner file atomically."""
        self._mine.unlink(missing_ok=True)  # left by a failed attempt
        _write(self._mine, holder)
        self._mine.replace(self._path(number))

    # --- files ------------------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / f".{self.name}-{number:07d}.json"

    def _number(self, file: str) -> int | None:
        found = re.fullmatch(rf"\.{re.escape(self.name)}-(\d{{7,18}})\.json", file)
        return int(found[1]) if found else None

    def _highest(self) -> tuple[int, Path | None]:
        """Return the highest number and its file; 0 and None without any."""
        found = (self._number(path.name) for path in self.folder.iterdir())
        numbers = [number for number in found if number is not None]
        return (max(numbers), self._path(max(numbers))) if numbers else (0, None)

    def _touch(self, path: Path) -> None:
        os.utime(path, None if self._clock is None else (self._clock(), self._clock()))

    def _now(self) -> float:
        """Return the time by which files here are dated, as a shared file system has its own clock."""
        self._touch(self._mine)
        return self._mine.stat().st_mtime

    def _here(self) -> float:
        return time.monotonic() if self._clock is None else self._clock()


@contextlib.contextmanager
def owned(folder: Path, timeout_s: float, *, key: str = "run.dir", beside: bool = False) -> Iterator[RunLock]:
    """Hold a folder for a run. Every process of the run calls this: the first takes the lock, the others wait for it.

    A nested call for the same folder does nothing. All processes raise the `ConfigError` of a refusal.
    """
    folder = folder.absolute()
    around = _around.get()
    if folder in around:
        yield around[folder]
        return
    lock = RunLock(folder, key=key, beside=beside)
    first_does(lock.take, timeout_s)
    token = _around.set({**around, folder: lock})
    try:
        yield lock
    finally:
        _around.reset(token)
        lock.release()


_around: ContextVar[dict[Path, RunLock]] = ContextVar("locks around this code", default={})  # noqa: B039


def _write(path: Path, holder: Holder) -> None:
    """Create a file, which must not exist, with the holder as its content."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(holder.to_json())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise
    except OSError:
        path.unlink(missing_ok=True)  # the disk is full: leave no empty file
        raise


def _end(message: str) -> None:
    """End this process at once, because anything it still writes would go into the folder of another run."""
    say(f"error: {message}")
    sys.stderr.flush()
    os._exit(ConfigError.exit_code)
