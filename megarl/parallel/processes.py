"""Start worker processes, and set torchrun's environment variables in processes that SLURM started."""

import os
import socket
from collections.abc import Callable
from typing import Any

from megarl.command import quiet
from megarl.config.launcher import started_by_slurm
from megarl.errors import ConfigError


def launched_workers(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` in new processes on this machine, each with its rank and its share of the cores.

    If one fails, the others are stopped and its error is raised as torch.multiprocessing formats it.
    """
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, (world, port, work, arguments), nprocs=world)


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
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in numbers.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    quiet()
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    work(*arguments)
