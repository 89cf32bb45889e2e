"""Start the processes of trials: on this machine, with a share of its cores and GPUs, or through Ray."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megarl.errors import ConfigError, UnavailableError

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        command: program and arguments.
        log: file for what it prints.
        environment: variables to set besides those of this process.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]


class Running(Protocol):
    """A job that was started."""

    pid: int | None
    """Process id on this machine; None if the job runs elsewhere."""

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""

    def stop(self, *, at_once: bool = False) -> None:
        """Ask it to save and end, or end it at once."""


class Backend(Protocol):
    """Starts jobs."""

    def start(self, job: Job) -> Running:
        """Start a job."""


class _LocalJob:
    def __init__(self, process: subprocess.Popen[bytes], release: Callable[[], None]) -> None:
        self._process, self._release = process, release
        self.pid: int | None = process.pid
        self._ended = False

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and not self._ended:
            self._ended = True
            self._release()
        return code

    def stop(self, *, at_once: bool = False) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)


class LocalJobs:
    """Runs jobs as processes of this machine. They end when this process dies: SIGTERM makes a run save and stop."""

    def __init__(self, at_once: int, *, cpus: int | None = None, gpus: int | None = None) -> None:
        """
        Args:
            at_once: number of jobs that run at the same time.
            cpus: threads per job; None: the cores divided among the jobs.
            gpus: GPUs per job; None: each sees all.
        """
        self._free = list(range(at_once))
        self._cpus = cpus or max(1, (os.cpu_count() or 1) // at_once)
        self._gpus = None if gpus is None else _shares_of_gpus(at_once, gpus)

    def start(self, job: Job) -> Running:
        """Start a job with the cores and GPUs of a free slot."""
        slot = self._free.pop(0)
        variables = {**os.environ, "OMP_NUM_THREADS": str(self._cpus), **job.environment}
        if self._gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = self._gpus[slot]
        with job.log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    job.command,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops its jobs once
                    preexec_fn=_end_with_parent(),
                )
            except OSError as problem:
                raise ConfigError(
                    f"'{job.command[0]}' cannot be started ({problem.strerror}): correct sweep.launcher",
                    key="sweep.launcher",
                    value=job.command[0],
                ) from None
        return _LocalJob(process, lambda: self._free.append(slot))


def _shares_of_gpus(at_once: int, gpus: int) -> list[str]:
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = listed or [str(number) for number in range(at_once * gpus)]
    if len(devices) < at_once * gpus:
        raise ConfigError(
            f"sweep.gpus={gpus} x sweep.at_once={at_once} is more than the {len(devices)} GPUs of "
            f"CUDA_VISIBLE_DEVICES={','.join(listed)}: use sweep.at_once={max(1, len(devices) // max(1, gpus))}",
            key="sweep.gpus",
            value=gpus,
            offers={"sweep.at_once": [max(1, len(devices) // max(1, gpus))]},
        )
    return [",".join(devices[slot * gpus : (slot + 1) * gpus]) for slot in range(at_once)]


def _end_with_parent() -> Callable[[], None] | None:
    """Return a function that a new process calls so that it gets SIGTERM when its parent dies; None where the kernel
    cannot do that."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class _RayJob:
    pid: int | None = None

    def __init__(self, ray: Any, result: Any) -> None:
        self._ray, self._result = ray, result

    def poll(self) -> int | None:
        ready, _ = self._ray.wait([self._result], timeout=0)
        return int(self._ray.get(self._result)) if ready else None

    def stop(self, *, at_once: bool = False) -> None:
        self._ray.cancel(self._result, force=at_once)


class RayJobs:
    """Runs jobs as tasks of Ray, which finds them a machine. All machines must share the file system."""

    def __init__(self, *, cpus: int | None = None, gpus: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UnavailableError(
                "sweep.backend=ray needs Ray: pip install ray, or use sweep.backend=local",
                key="sweep.backend",
                value="ray",
                offers={"sweep.backend": ["local"]},
            ) from None
        self._ray = ray
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        self._task = ray.remote(num_cpus=cpus or 1, num_gpus=gpus or 0)(_run)

    def start(self, job: Job) -> Running:
        """Start a task that runs the job."""
        place = str(Path.cwd())
        return _RayJob(self._ray, self._task.remote(list(job.command), str(job.log), dict(job.environment), place))


def _run(command: list[str], log: str, environment: dict[str, str], folder: str) -> int:
    """Run a command on the machine that Ray has chosen, and return its exit code."""
    with Path(log).open("ab") as output:
        variables = {**os.environ, **environment}
        return subprocess.run(
            command, env=variables, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
