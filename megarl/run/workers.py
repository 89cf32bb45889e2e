"""Processes of one run that a script or a notebook starts itself, and calls: `python -m megarl.run.workers`.

The process that starts them imports neither torch nor Megatron for it. Their output appears as its own, so that a
notebook shows it. They end when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import megarl
from megarl.config.launcher import started_by_slurm
from megarl.errors import ConfigError, MegarlError, UnavailableError
from megarl.parallel.processes import free_port, rank_environment
from megarl.rewards.wire import Channel, PipeClosed

PATIENCE_S = 10.0
"""Seconds in which the other workers answer after one has failed."""
GRACE_S = 20.0
"""Seconds in which workers may end by themselves after the pipes to them are closed."""

State = dict[str, Any]
"""What a worker keeps between calls."""


class Workers:
    """The processes of a run on this machine. A call runs in all of them, and the first one's answer is returned."""

    def __init__(self, count: int) -> None:
        """Start `count` processes, each with its rank and its share of the cores."""
        port = free_port()
        self._workers: list[_Worker] = []
        try:
            for rank in range(count):
                self._workers.append(_Worker(rank, count, port))
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what `function(state, *arguments, **options)` returns in the first process, or raise what it raises.

        The function runs in all processes. Ctrl-C here is passed on to them once; a second one ends them.
        """
        import cloudpickle

        if not self._workers:
            raise UnavailableError("the processes of this run have ended: start it anew", key="processes")
        job = cloudpickle.dumps((list(sys.path), cloudpickle.dumps((function, arguments, options))))
        try:
            for worker in self._workers:
                worker.send(job)
            answers = self._answers()
        except _EndedError as ended:
            self.close(grace_s=0.0)  # the others wait for a process that will not answer
            raise ended.problem from None
        except KeyboardInterrupt:
            self.close(grace_s=0.0)
            raise
        for fine, value in answers:
            if not fine:
                raise value
        return answers[0][1]

    def _answers(self) -> list[tuple[bool, Any]]:
        """Return whether the call succeeded, and its value or error, for each process."""
        answers: list[tuple[bool, Any]] = []
        interrupted = False
        while len(answers) < len(self._workers):
            worker = self._workers[len(answers)]
            try:
                answers.append(worker.receive(self._look, failed=any(not fine for fine, _ in answers)))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                for each in self._workers:
                    each.interrupt()
            except _EndedError as ended:
                raise _EndedError(next((value for fine, value in answers if not fine), ended.problem)) from None
        return answers

    def _look(self) -> None:
        """Raise if a process has ended: the others may wait for it for ever."""
        for worker in self._workers:
            worker.look()

    def close(self, *, grace_s: float = GRACE_S) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end(grace_s)
        self._workers = []


@contextmanager
def started(count: int, config: Any) -> Iterator[Workers]:
    """Start `count` processes for a run, and end them at the end. `trainer.devices` becomes their number."""
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"processes={count!r} is no number of processes: use 1 or more", key="processes", value=count)
    if "WORLD_SIZE" in os.environ or started_by_slurm(os.environ):
        raise ConfigError(
            f"processes={count} starts processes, and a launcher has started this one: leave processes out",
            key="processes",
            value=count,
        )
    config.trainer.devices = count
    workers = Workers(count)
    try:
        yield workers
    finally:
        workers.close()


class _EndedError(Exception):
    """A worker gave no answer. `problem` is the error to raise."""

    def __init__(self, problem: Exception) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, rank: int, count: int, port: int) -> None:
        self.rank = rank
        request_end, ours_out = os.pipe()
        ours_in, answer_end = os.pipe()
        self._channel = Channel(ours_in, ours_out)
        environ = {**os.environ, **rank_environment(rank, count, port), "PYTHONUNBUFFERED": "1"}
        package = str(Path(megarl.__file__).parent.parent)
        environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megarl.run.workers", str(request_end), str(answer_end)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(request_end, answer_end),
                env=environ,
                start_new_session=True,  # Ctrl-C in a terminal reaches it through `interrupt` alone
            )
        finally:
            os.close(request_end)
            os.close(answer_end)
        assert self._process.stdout is not None
        self._output = threading.Thread(target=_repeat, args=(self._process.stdout,), daemon=True)
        self._output.start()

    def send(self, job: bytes) -> None:
        """Send a call."""
        try:
            self._channel.send(job, self.look)
        except PipeClosed:
            self.look()

    def receive(self, look_at_all: Callable[[], None], *, failed: bool) -> tuple[bool, Any]:
        """Return whether the call succeeded, and its value or its error.

        Args:
            look_at_all: is called while this waits, and raises if a process has ended.
            failed: whether another worker failed, for which this one may wait for ever.
        """
        deadline = time.monotonic() + (PATIENCE_S if failed else float("inf"))

        def look() -> None:
            look_at_all()
            if time.monotonic() > deadline:
                raise _EndedError(self._problem("waits for another that failed"))

        try:
            return pickle.loads(self._channel.receive(look))  # type: ignore[no-any-return]
        except PipeClosed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            raise _EndedError(self._problem(f"ended with exit code {self._process.returncode}")) from None

    def interrupt(self) -> None:
        """Pass Ctrl-C on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def hang_up(self) -> None:
        """Close the pipes, which ends the process."""
        self._channel.close()

    def end(self, grace_s: float) -> None:
        """Wait for the end of the process, and kill it if it does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.join(timeout=1.0)

    def look(self) -> None:
        """Raise if the process has ended."""
        if self._process.poll() is not None:
            raise _EndedError(self._problem(f"ended with exit code {self._process.returncode}"))

    def _problem(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"process {self.rank} of this run's processes {what}: read what it printed above",
            key="processes",
            where=f"process {self.rank}",
        )


def _repeat(stream: IO[bytes]) -> None:
    """Write a worker's output to this process's standard error, piece by piece as it comes."""
    while piece := stream.read1(1 << 16):  # type: ignore[attr-defined]
        with contextlib.suppress(ValueError, OSError):
            sys.stderr.write(piece.decode("utf-8", errors="backslashreplace"))
            sys.stderr.flush()


# --- in a worker ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the calls that come over the pipe."""
    parser = argparse.ArgumentParser(description="Part of a run that a script started; not for use by hand.")
    parser.add_argument("requests", type=int, help="descriptor to read calls from")
    parser.add_argument("answers", type=int, help="descriptor to write answers to")
    arguments = parser.parse_args()
    channel = Channel(arguments.requests, arguments.answers)
    jobs: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, jobs), daemon=True).start()
    state: State = {}
    while (job := _next(jobs)) is not None:
        channel.send(_answer(job, state), lambda: None)
    for value in state.values():
        close = getattr(value, "close", None)
        if close is not None:
            close()


def _next(jobs: queue.SimpleQueue[bytes | None]) -> bytes | None:
    """Return the next call. Ctrl-C that arrives between two calls is too late for the one before it."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return jobs.get()


def _listen(channel: Channel, jobs: queue.SimpleQueue[bytes | None]) -> None:
    """Put calls into the queue. When the caller is gone, let a run that is under way save and end."""
    try:
        while True:
            jobs.put(channel.receive(lambda: None))
    except PipeClosed:
        jobs.put(None)
        if jobs.qsize() > 0 and _busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


_busy = threading.Event()


def _answer(job: bytes, state: State) -> bytes:
    import cloudpickle
    import torch

    from megarl.command import quiet

    quiet()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    _busy.set()
    try:
        path, packed = pickle.loads(job)
        sys.path[:] = path  # before the rest is unpickled, which may import the caller's modules
        function, arguments, options = pickle.loads(packed)
        answer: tuple[bool, Any] = (True, function(state, *arguments, **options))
    except BaseException as problem:  # also SystemExit and KeyboardInterrupt, which the caller raises
        answer = (False, problem)
    finally:
        _busy.clear()
    if answer[0] and int(os.environ["RANK"]) != 0:
        answer = (True, None)  # the first process's answer is the one that is returned
    try:
        return cloudpickle.dumps(answer)  # type: ignore[no-any-return]
    except Exception as problem:
        what = f"{type(answer[1]).__name__} cannot be sent back from the run's process ({problem})"
        return cloudpickle.dumps((False, MegarlError(what, where=type(answer[1]).__name__)))  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
