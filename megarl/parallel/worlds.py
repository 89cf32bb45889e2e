"""Processes of this machine that form a world and stay alive for many calls. They import once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from megarl.command import quiet
from megarl.errors import MegarlError
from megarl.parallel import cpu
from megarl.parallel.processes import free_port, rank_environment


class WorldError(Exception):
    """A process of a world failed, ended or did not answer in time. The text says so in full."""


class Worlds:
    """A world of processes at a time. A call with another number of processes starts another world."""

    def __init__(self, preload: Sequence[str]) -> None:
        """`preload` are modules that one process imports, of which the others are copies. Beside a GPU, whose state no
        copy can use, each imports by itself."""
        self._context: Any = multiprocessing.get_context("forkserver" if cpu.needed() else "spawn")
        if cpu.needed():
            self._context.set_forkserver_preload(list(preload))
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def call(self, size: int, limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function(*arguments)` returns in the first of `size` processes. All of them call it.

        Raises a `MegarlError` that the function raised, and `WorldError` for anything else. Then the processes are
        given up, and the next call starts others.
        """
        if len(self._processes) != size:
            self.close()
            self._start(size)
        port = free_port()
        try:
            for rank, pipe in enumerate(self._pipes):
                pipe.send_bytes(pickle.dumps((rank_environment(rank, size, port), function, arguments)))
            return self._answers(limit_s)[0]
        except OSError:
            raise WorldError("a process ended before the call") from None
        finally:
            if any(not process.is_alive() for process in self._processes):
                self.close()

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self, size: int) -> None:
        for _ in range(size):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _answers(self, limit_s: float) -> list[Any]:
        """Return the answers of all processes by rank."""
        answers: dict[int, Any] = {}
        failures: list[Exception] = []
        deadline = time.monotonic() + limit_s
        while len(answers) + len(failures) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                failure = _received(pipe, waiting[pipe], answers)
                if failure is not None:
                    failures.append(failure)
            if failures:
                break
        if len(answers) < len(self._pipes):
            self.close()
            raise failures[0] if failures else WorldError(f"no answer within {limit_s:g} s")
        return [answers[rank] for rank in range(len(answers))]


def _received(pipe: Connection, rank: int, answers: dict[int, Any]) -> Exception | None:
    """Put the answer of a rank among those that there are, or return how it failed."""
    try:
        fine, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return WorldError(f"rank {rank} ended without an answer")
    if fine:
        answers[rank] = value
        return None
    return value if isinstance(value, MegarlError) else WorldError(f"rank {rank}: {value}")


def _serve(pipe: Connection) -> None:
    """Answer calls until the other end of the pipe is closed. Each is a world of its own: process groups have threads,
    which last as long as the world."""
    quiet()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what the imports left is no garbage
    while True:
        try:
            environment, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ.update(environment)
        answer: tuple[bool, Any]
        try:
            answer = (True, function(*arguments))
        except MegarlError as problem:
            answer = (False, problem)
        except Exception:
            answer = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))
