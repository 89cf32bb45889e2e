"""Runs untrusted Python programs with limits of time, memory, processes and files, without network, and without a view
of the machine's files and processes.

Where the kernel allows none of the kinds of isolation below, nothing is run: `SandboxError` names what it refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import marshal
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megarl.errors import RewardError
from megarl.rewards.seccomp import system_call_filter

NAMESPACES, USER_NAMESPACES, SEPARATE_USER = "namespaces", "user namespaces", "separate user"
ISOLATIONS = (NAMESPACES, USER_NAMESPACES, SEPARATE_USER)
"""What can surround a program, the first that works being used. All have limits and the system call filter.

namespaces: new process, network, mount, IPC and host name namespaces, made by the superuser, and a user number that
    nobody else has. user namespaces: the same, made by anybody where the kernel allows it. separate user: a user number
    that nobody else has and a filter that allows no file to be changed and no socket; needs the superuser.
"""

GRACE_S = 5.0
"""Seconds after the time-out at which a sandbox that has not reported is killed from outside."""

_CHILD = Path(__file__).with_name("sandbox_child.py")
_HIGHEST_UID = 2_147_000_000
_UIDS = 50_000_000
_NOBODY = 65_534
_START = "import os; exec(compile(os.fdopen(3, 'rb').read(), 'program', 'exec'))"
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")


class SandboxError(RewardError):
    """No isolation is possible on this machine, or it has failed."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_s: seconds until it is killed.
        memory: bytes of address space of a process, and resident bytes of all its processes together.
        processes: processes and threads at a time.
        disk: bytes of a file, and of all its files together; they are held in memory.
        files: open files of a process.
    """

    wall_s: float = 10.0
    memory: int = 512 << 20
    processes: int = 32
    disk: int = 32 << 20
    files: int = 128


@dataclass(frozen=True)
class End:
    """How a program ended.

    Attributes:
        how: ended (by itself, with `code`), killed (by a signal, or as it was no longer wanted), timed_out or
            out_of_memory.
        why: the limit or the signal.
        code: its exit code, where it ended by itself.
    """

    how: str
    why: str = ""
    code: int | None = None


class Program:
    """A Python program in a sandbox. Use it as a context: at its end, every process of the program is gone."""

    def __init__(self, source: bytes, fds: Sequence[int], limits: Limits, isolation: str | None = None) -> None:
        """Start it.

        Args:
            source: Python source. It runs without site packages.
            fds: descriptors that become 0, 1, 2 and 4, 5 ... of the program; it has no others. 3 was its source.
            limits: what it may use.
            isolation: one of ISOLATIONS; None for the first that works here.

        Raises:
            SandboxError: no isolation is possible.
        """
        isolation = isolation or working_isolation()
        self._limits = limits
        self._end: End | None = None
        status, status_end = os.pipe()
        code = sealed(source)
        numbers = [*fds[:3], code, *fds[3:]]
        python = python_for(isolation)
        config = {
            "parent": os.getpid(),
            "isolation": isolation,
            "uid": unused_uid(),
            "fds": numbers,
            "status": status_end,
            "limits": asdict(limits),
            "binds": shown_paths(python),
            "filter": _filter(isolation == SEPARATE_USER),
            "command": [python, "-I", "-S", "-B", "-c", _START],
            "env": {
                "PATH": "/usr/bin:/bin",
                "HOME": "/work",
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",
                "PYTHONUTF8": "1",
                "MALLOC_ARENA_MAX": "2",
            },
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(status_end, *numbers),
                env={"LANG": "C.UTF-8"},
                cwd="/",
            )
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(status_end)
            os.close(code)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(marshal.dumps(config))
            self._process.stdin.flush()
        self._status = status
        self._deadline = time.monotonic() + limits.wall_s + GRACE_S

    def wait(self) -> End:
        """Return how the program ended, when it and all that it started are gone.

        Raises:
            SandboxError: the kernel refused a step of the isolation, so that the program was not started.
        """
        if self._end is None:
            text = b"".join(read_until(self._status, self._deadline))
            how = "timed_out" if time.monotonic() >= self._deadline else "killed"
            self._finish()
            report: dict[str, Any] = marshal.loads(text) if text else {"how": how, "why": "the sandbox did not report"}
            if report["how"] == "refused":
                raise SandboxError(f"the sandbox could not start a program: {report['why']}", key="reward.fn")
            self._end = End(report["how"], report.get("why", ""), report.get("code"))
        return self._end

    def stop(self) -> End:
        """End the program now, if it has not ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
        return self.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(SandboxError):
            self.stop()
        self._finish()
        os.close(self._status)

    def _finish(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel kills the rest with it
            self._process.wait()


def run(
    source: bytes, stdin: bytes = b"", limits: Limits | None = None, max_output: int = 1 << 20
) -> tuple[End, bytes]:
    """Run a program to its end. Return how it ended, and what it wrote to its standard output.

    A program that writes more than `max_output` bytes is killed.
    """
    limits = limits or Limits()
    text = bytearray()
    with contextlib.ExitStack() as opened:
        entry = _closed_with(opened, sealed(stdin))
        output, output_end = os.pipe()
        _closed_with(opened, output)
        null = _closed_with(opened, os.open(os.devnull, os.O_WRONLY))
        try:
            program = opened.enter_context(Program(source, (entry, output_end, null), limits))
        finally:
            os.close(output_end)
        deadline = time.monotonic() + limits.wall_s + GRACE_S
        for piece in read_until(output, deadline):
            text += piece
            if len(text) > max_output:
                program.stop()
                return End("killed", f"more than {max_output} bytes of output"), bytes(text[:max_output])
        return program.wait(), bytes(text)


@functools.cache
def working_isolation() -> str:
    """Return the first isolation that this machine allows. It is tried out, once per process.

    Raises:
        SandboxError: there is none.
    """
    return find_isolation(ISOLATIONS)


def find_isolation(choices: Sequence[str]) -> str:
    """Return the first of `choices` in which a program runs to its end."""
    reasons = []
    for isolation in choices:
        why = _try(isolation)
        if not why:
            return isolation
        reasons.append(f"{isolation}: {why}")
    raise SandboxError(
        f"programs cannot be run here, as no sandbox is possible ({'; '.join(reasons)}): an administrator can allow "
        "user namespaces (sysctl user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile with unshare and mount), or "
        "run this as root with CAP_SETUID and a Python that all users can read",
        key="reward.fn",
        offers={"isolation": ISOLATIONS},
    )


def _try(isolation: str) -> str:
    """Return why an isolation does not work here, or nothing."""
    if sys.platform != "linux":
        return f"needs Linux, not {sys.platform}"
    if isolation != USER_NAMESPACES and os.geteuid() != 0:
        return "needs the superuser"
    if isolation != USER_NAMESPACES and unused_uid() is None:
        return "no other user number is mapped"
    with contextlib.ExitStack() as opened:
        null = _closed_with(opened, os.open(os.devnull, os.O_RDWR))
        try:
            with Program(b"import json, sys; sys.exit(3)", (null, null, null), Limits(), isolation) as program:
                end = program.wait()
        except (SandboxError, OSError, NotImplementedError) as error:
            return str(error).removeprefix("the sandbox could not start a program: ")
    return "" if end.code == 3 else f"{python_for(isolation)} {end.how} {end.code or end.why}"


def python_for(isolation: str) -> str:
    """Return the interpreter of sandboxed programs: the one that this environment is based on.

    Another user than the superuser may not be allowed to reach it, as in /root: then it is the system's.
    """
    own = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if isolation == NAMESPACES or unused_uid() is None:
        return own
    choices = [path for path in (own, "/usr/local/bin/python3", "/usr/bin/python3") if _all_may_run(path)]
    return os.path.realpath((choices or [own])[0])


def _all_may_run(path: str) -> bool:
    file = Path(os.path.realpath(path))
    return file.exists() and all(step.stat().st_mode & 0o005 == 0o005 for step in (file, *file.parents))


def shown_paths(python: str) -> list[str]:
    """Return the files and folders of the machine that a program can read, the outermost first."""
    own = [f"{sys.base_prefix}/lib", str(Path(os.__file__).resolve().parent)]
    paths = [python, *_SYSTEM, *(path for path in own if path != "/lib")]
    return list(dict.fromkeys(path for path in paths if os.path.lexists(path)))


_random = random.SystemRandom()


def unused_uid() -> int | None:
    """Return a user number that nobody has, or None where this process cannot become another user."""
    if os.geteuid() != 0:
        return None
    maps = [line.split() for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
    first, count = max(((int(line[0]), int(line[2])) for line in maps), key=lambda extent: extent[1])
    highest = min(first + count - 1, _HIGHEST_UID)
    span = min(_UIDS, (highest - first) // 4)
    if span < 2:
        return None
    return next(uid for uid in iter(lambda: highest - _random.randrange(span), None) if uid != _NOBODY)


def sealed(content: bytes) -> int:
    """Return a descriptor to read `content` from. Nobody can change it."""
    number = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    fcntl.fcntl(
        number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    )
    return number


_filter_lock = threading.Lock()
_filters: dict[bool, str] = {}


def _filter(read_only: bool) -> str:
    with _filter_lock:
        if read_only not in _filters:
            _filters[read_only] = system_call_filter(read_only).hex()
        return _filters[read_only]


def _closed_with(opened: contextlib.ExitStack, number: int) -> int:
    opened.callback(os.close, number)
    return number


def read_until(fd: int, deadline: float) -> Iterator[bytes]:
    """Yield what arrives at a descriptor until its other end is closed or the deadline (`time.monotonic`) has
    passed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(max(1, left * 1000)):
            piece = os.read(fd, 1 << 16)
            if not piece:
                return
            yield piece
