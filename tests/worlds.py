"""A gloo world inside a test: worker processes that stay alive for the whole run and are re-grouped per test."""

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

PATIENCE_S = 5.0
"""Seconds that the other ranks have to end after one failed, before the world is given up."""

IMPORTED_ONCE = ("megatron.core.parallel_state", "megarl.training", "tests.preloaded")
"""What one process imports, which takes seconds. Every worker process is a copy of it, also one after a killed one."""


def forked() -> Any:
    """The context of processes that are copies of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    return context


def _worker(pipe: Connection, index: int, folders: tuple[str, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = folders
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what the imports left is no garbage
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        function, args, kwargs, size, meeting_point = cloudpickle.loads(job)
        try:
            store = dist.FileStore(meeting_point, size)
            dist.init_process_group("gloo", store=store, rank=index, world_size=size)
            answer: tuple[bool, Any] = (True, function(*args, **kwargs))
        except Exception as problem:
            problem.add_note(f"in rank {index} of {size}:\n{traceback.format_exc()}")
            answer = (False, problem)
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # engines and grids hold their groups in cycles, and every group has threads of its own
        try:
            pipe.send_bytes(cloudpickle.dumps(answer))
        except Exception:  # an answer that cannot travel
            pipe.send_bytes(cloudpickle.dumps((False, RuntimeError(f"rank {index} cannot send {answer!r}"))))


class Worlds:
    """Runs a function on every rank of a world of up to four processes and returns the ranks' results in order."""

    def __init__(self, *folders: str) -> None:
        """`folders` are searched for packages first, in the worker processes alone, which import all by themselves."""
        self._folders = folders
        self._context: Any = multiprocessing.get_context("spawn") if folders else forked()
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0, **kwargs: Any
    ) -> list[Any]:
        """`function(*args, **kwargs)` in `size` processes, with torch.distributed set up. Raises what a rank raised."""
        if any(not process.is_alive() for process, _ in self._workers):
            self.close()  # a test killed a worker: start afresh
        self._grow_to(size)
        with tempfile.TemporaryDirectory() as folder:
            job = cloudpickle.dumps((function, args, kwargs, size, f"{folder}/store"))
            pipes = [pipe for _, pipe in self._workers[:size]]
            for pipe in pipes:
                pipe.send_bytes(job)
            answers: list[tuple[bool, Any]] = []
            for rank, pipe in enumerate(pipes):
                # Others may wait in a collective for a rank that failed, for ever.
                failed = any(not fine for fine, _ in answers)
                if not pipe.poll(PATIENCE_S if failed else timeout):
                    self.close()
                    if failed:
                        break
                    raise TimeoutError(f"rank {rank} of {size} gave no answer within {timeout} s")
                try:
                    answers.append(cloudpickle.loads(pipe.recv_bytes()))
                except EOFError:  # a test killed the worker, which may still count as alive for a moment
                    self.close()
                    raise
        for fine, value in answers:
            if not fine:
                raise value
        return [value for _, value in answers]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _grow_to(self, size: int) -> None:
        while len(self._workers) < size:
            here, there = self._context.Pipe()
            process = self._context.Process(
                target=_worker, args=(there, len(self._workers), self._folders), daemon=True
            )
            process.start()
            there.close()
            self._workers.append((process, here))
