"""Rendezvous of a run's processes: the store that they connect to, and the sockets that they listen on.

A run on one machine listens on the loopback interface only. A run over several machines uses torch's defaults.
"""

import atexit
import contextlib
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megarl.command import process_number, say
from megarl.errors import MegarlError, UnavailableError, first_line
from megarl.parallel.processes import set_env_from_slurm

LOOPBACK = "127.0.0.1"
_PATIENCE_S = 300.0  # added to the run's timeout, as the first process may wait for the run folder to be released
_ERROR_READ_S = 30.0  # how long a failing first process waits for the others to read its error
_stores: dict["Seat", Store] = {}  # opened by this process
_groups = 0  # process groups made so far; each uses separate keys in the store


@dataclass(frozen=True)
class Seat:
    """This process's rank in the run, and the address of the run's store."""

    rank: int
    world: int
    address: str
    port: int
    one_machine: bool

    @staticmethod
    def alone() -> "Seat":
        """Return the seat of a process that was started alone: a world of one on the loopback interface."""
        return Seat(0, 1, LOOPBACK, 0, one_machine=True)

    @staticmethod
    def launched(environ: Mapping[str, str] = os.environ) -> "Seat | None":
        """Return the seat that torchrun, a launcher or `set_env_from_slurm` set; None in a process started alone."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
            return None
        world = int(environ["WORLD_SIZE"])
        local = int(environ.get("LOCAL_WORLD_SIZE", "0"))
        return Seat(int(environ["RANK"]), world, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), local == world)


def join(backend: str, seat: Seat, timeout_s: float, device_id: torch.device | None = None) -> None:
    """Create the default process group, unless it exists."""
    global _groups
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_s)
    store: Store
    if seat.world == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    else:
        _groups += 1
        store = PrefixStore(f"group{_groups}", open_store(seat, timeout_s))
    if seat.one_machine:
        stay_on_this_machine()
    dist.init_process_group(
        backend, store=store, rank=seat.rank, world_size=seat.world, timeout=timeout, device_id=device_id
    )
    if backend == "nccl":
        atexit.register(_leave)  # torch warns about a group that still exists at exit


def stay_on_this_machine() -> None:
    """Make gloo and NCCL listen on the loopback interface, unless the environment names another one."""
    names = [name for name, found in psutil.net_if_addrs().items() if any(one.address == LOOPBACK for one in found)]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


def open_store(seat: Seat, timeout_s: float) -> Store:
    """Return the run's store: torchrun's if it has one, else the first process's. It is opened once per process."""
    if seat in _stores:
        return _stores[seat]
    hosted = not _store_is_torchruns()
    first, local = hosted and seat.rank == 0, hosted and seat.one_machine
    address = LOOPBACK if local else seat.address
    try:
        store = TCPStore(
            address,
            seat.port,
            seat.world,
            is_master=first,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=_listen(seat.port) if first and local else None,
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )
    except (RuntimeError, OSError) as problem:
        raise UnavailableError(
            f"the processes of this run cannot connect to {address}:{seat.port} ({first_line(problem)}): read what "
            "the first one printed, or set MASTER_ADDR and MASTER_PORT to a free port",
            key="MASTER_PORT",
            value=seat.port,
            where=f"{address}:{seat.port}",
        ) from None
    # A worker group that torchrun restarts uses the same store, so the restart count is part of the keys.
    _stores[seat] = PrefixStore(f"megarl{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return _stores[seat]


def first_does(work: Callable[[], None], timeout_s: float) -> None:
    """Run `work` on the first process of the run while the others wait, before there is a process group.

    A `MegarlError` on the first process is raised on all. Where the first process starts the others itself, it runs
    `work` before it starts them.
    """
    set_env_from_slurm()
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    else:
        seat = Seat.launched() or Seat.alone()
        rank, world = seat.rank, seat.world
    if world == 1:
        if process_number() == 0:
            work()
        return
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else open_store(seat, timeout_s)
    key = f"first/{store.add(f'first/of{rank}', 1)}"  # all processes have called this as often
    if rank == 0:
        _work_as_first(work, store, key, world)
    else:
        _wait_for_first(store, key, timeout_s)


def _work_as_first(work: Callable[[], None], store: Store, key: str, world: int) -> None:
    try:
        work()
    except MegarlError as problem:
        # Printed before the others exit: a launcher stops all processes when one exits.
        say(f"error: {problem}")
        problem.said = True
        store.set(key, pickle.dumps(problem))  # type: ignore[arg-type]
        deadline = time.monotonic() + (0.0 if _store_is_torchruns() else _ERROR_READ_S)
        while store.add(f"{key}/read", 0) < world - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        raise
    store.set(key, "")


def _wait_for_first(store: Store, key: str, timeout_s: float) -> None:
    try:
        with interruptible():
            store.wait([key], timedelta(seconds=timeout_s + _PATIENCE_S))
        refusal = store.get(key)
        store.add(f"{key}/read", 1)
    except RuntimeError as problem:
        raise UnavailableError(
            f"the first process of this run ended, or did not answer within {timeout_s + _PATIENCE_S:g} s, "
            f"before it locked the folders that the run writes ({first_line(problem)}): read what it printed",
            where="the first process of this run",
        ) from None
    if refusal:
        time.sleep(1.0)  # let the first process exit first: launchers report the first that exits
        error: MegarlError = pickle.loads(refusal)
        raise error


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end this process at once while processes wait in C++, where Python's signal handlers do not run."""
    python_handles_sigint = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not python_handles_sigint or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _listen(port: int) -> int:
    """Return the descriptor of a listening socket on the loopback interface."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(1024)
        return listening.detach()


def _store_is_torchruns() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
