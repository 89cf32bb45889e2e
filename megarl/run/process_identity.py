"""Identification of the process that holds a run folder, and whether it is still alive."""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

_DEAD = ("Z", "X")  # a zombie keeps its process id until its parent reads its exit code


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder, as stored in the owner file."""

    id: str  # unique id of the lock
    host: str
    pid: int
    started: float | None  # `start_of` the process; null: unknown
    boot: str | None  # the kernel's boot id; null: not Linux
    namespace: int | None  # of process ids, as a container has its own; null: not Linux
    folder: str
    inode: int
    job: str | None  # SLURM cluster and job id
    restart: int  # how often SLURM has requeued the job
    since: float  # seconds since the epoch, by the holder's clock
    released: bool = False

    @property
    def machine(self) -> tuple[str, str | None, int | None]:
        """Identifies the namespace of process ids: ids are comparable between processes for which this is equal."""
        return self.host, self.boot, self.namespace

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on host {self.host}, started {since}"

    def to_json(self) -> str:
        """Return the content of the owner file."""
        return json.dumps(asdict(self)) + "\n"


def read(path: Path) -> tuple[Holder | None, float]:
    """Return the content of an owner file (None if it is empty or damaged) and the time of its last refresh.

    Opening the file makes the client of a file server fetch its present state.
    """
    with path.open("rb") as file:
        return parse(file.read()), os.fstat(file.fileno()).st_mtime


def parse(text: bytes) -> Holder | None:
    """Parse what `Holder.to_json` wrote; return None for anything else."""
    try:
        content: dict[str, Any] = json.loads(text)
        holder = Holder(**{field.name: content[field.name] for field in fields(Holder)})
        numbers = (holder.pid, holder.inode, holder.restart)
        texts = (holder.id, holder.host, holder.folder)
        sound = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
        optional = (holder.started is None or isinstance(holder.started, int | float)) and holder.released in (0, 1)
        time.localtime(holder.since)
        return holder if sound and optional and 0 < holder.pid < 2**31 else None
    except (ValueError, LookupError, TypeError, OverflowError, OSError, RecursionError):
        return None


def this_process(folder: Path, host: str | None, pid: int | None, environ: Mapping[str, str]) -> Holder:
    """Return this process as the holder of a folder. Tests pass another host and process id."""
    job = environ.get("SLURM_JOB_ID")
    restart = environ.get("SLURM_RESTART_COUNT", "0")
    pid = os.getpid() if pid is None else pid
    return Holder(
        id=uuid.uuid4().hex,
        host=socket.gethostname() if host is None else host,
        pid=pid,
        started=start_of(pid),
        boot=_boot(),
        namespace=_namespace(),
        folder=str(folder),
        inode=folder.stat().st_ino,
        job=f"{environ.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else None,
        restart=int(restart) if restart.isdigit() else 0,
        since=time.time(),
    )


def lives(pid: int, started: float | None) -> bool:
    """Return whether a process of this machine still runs and its id was not reused by another process.

    A process that cannot be inspected (another user's, hidden) counts as alive.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    found = _state_and_start(pid)
    if found is None:
        return True
    state, start = found
    return state not in _DEAD and started in (None, start)


def start_of(pid: int) -> float | None:
    """Return when a process started: clock ticks since boot on Linux, which setting the clock does not change, else a
    time."""
    found = _state_and_start(pid)
    return None if found is None else found[1]


def _state_and_start(pid: int) -> tuple[str, float] | None:
    try:
        # The process name, in parentheses, may contain any character.
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return words[0].decode(), float(words[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        process = psutil.Process(pid)
        return "Z" if process.status() == psutil.STATUS_ZOMBIE else "R", process.create_time()
    except (psutil.Error, OSError):
        return None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _namespace() -> int | None:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None
