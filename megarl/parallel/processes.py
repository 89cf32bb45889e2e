"""Start worker processes, and set torchrun's environment variables in processes that SLURM started."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from megarl.command import quiet, say
from megarl.config.launcher import started_by_slurm
from megarl.errors import ConfigError, MegarlError

Started = Callable[[Sequence[BaseProcess]], None]


def run_in_processes(world: int, work: Callable[[Any], None], config: Any, *, started: Started | None = None) -> int:
    """Run `work(config)` in new processes on this machine, and return the exit code.

    An error that the user can fix is printed once, by this process. `started` is as in `launched_workers`.
    """
    from torch.multiprocessing import get_context
    from torch.multiprocessing.spawn import ProcessExitedException

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of every process it ends
    problems = get_context("spawn").SimpleQueue()
    try:
        launched_workers(world, _one_line, work, config, problems, started=started)
    except ProcessExitedException as ended:
        if not problems.empty():  # the error of the process that failed first
            say(f"error: {problems.get()}")
        return int(ended.exit_code)
    return 0


def _one_line(work: Callable[[Any], None], config: Any, problems: Any) -> None:
    """Run `work` in one of several processes. Errors that the user can fix are put into `problems`."""
    try:
        work(config)
    except MegarlError as error:
        if config.debug:
            raise
        if not error.said:
            problems.put(str(error))
        sys.exit(error.exit_code)


def launched_workers(world: int, work: Callable[..., None], *arguments: Any, started: Started | None = None) -> None:
    """Run `work(*arguments)` in new processes on this machine, each with its rank and its share of the cores.

    If one fails, the others are stopped and its error is raised as torch.multiprocessing formats it.

    Args:
        started: is called with the processes when all have started.
    """
    from torch.multiprocessing.spawn import spawn

    context = spawn(_process, (world, free_port(), work, arguments), nprocs=world, join=False)
    assert context is not None
    if started is not None:
        started(context.processes)
    while not context.join():
        pass  # some processes are still running


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set in one of `world` processes on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {**{key: str(value) for key, value in numbers.items()}, "MASTER_ADDR": "127.0.0.1"}


def set_env_from_slurm() -> None:
    """In a task of srun, set the variables that torchrun would set."""
    if "WORLD_SIZE" in os.environ or not started_by_slurm(os.environ):
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    try:
        slurm = SLURMEnvironment(auto_requeue=False)
    except RuntimeError as problem:  # raised for --ntasks without --ntasks-per-node
        raise ConfigError(f"srun: {problem}", where="srun") from None
    numbers = {"RANK": slurm.global_rank(), "LOCAL_RANK": slurm.local_rank(), "WORLD_SIZE": slurm.world_size()}
    numbers["LOCAL_WORLD_SIZE"] = slurm.world_size() // int(os.environ.get("SLURM_NNODES", "1"))
    os.environ.update({key: str(value) for key, value in {**numbers, "MASTER_PORT": slurm.main_port}.items()})
    os.environ["MASTER_ADDR"] = slurm.main_address


def _process(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(rank_environment(rank, world, port))
    quiet()
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    work(*arguments)
