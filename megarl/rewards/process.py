"""One worker process and the pipe to it: start, call, time out and kill. The content of a call is bytes here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import megarl
from megarl.command import printable
from megarl.disk import UnreadableError, parse_object
from megarl.logging import get_logger
from megarl.rewards.human import TERMINAL
from megarl.rewards.wire import END_OF_CALL, Channel, PipeClosed

_log = get_logger(__name__)

DISTRIBUTED = ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK")
DISTRIBUTED_PREFIXES = ("LOCAL_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_")
"""Environment variables of a process group: a library that sees them in the worker would wait for other ranks."""

MOST_LINES = 200
"""Maximum number of logged lines per call; further lines are only counted."""
_MOST_BYTES = 40_000
"""Maximum number of logged bytes per call, for calls that print few but long lines."""
_LONGEST_LINE = 4000
_BLOCK = 1 << 16
_LONGEST_REASON = 400


class CallFailedError(Exception):
    """A call failed. The text completes "reward.fn=NAME ...".

    Attributes:
        kind: what went wrong: raised, count, late or died.
        where: `file:line` of the user's code that raised, if it is known.
    """

    def __init__(self, text: str, kind: str, where: str | None = None) -> None:
        super().__init__(text)
        self.kind, self.where = kind, where


class WorkerProcess:
    """A running `python -m megarl.rewards.worker`, in its own process group."""

    def __init__(self, name: str, devices: str | None) -> None:
        """Start the process.

        Args:
            name: name of the function, for the log of its output.
            devices: CUDA_VISIBLE_DEVICES; None keeps this process's.
        """
        self._name = name
        self._output = Output(name)
        request_end, ours_out = os.pipe()
        ours_in, answer_end = os.pipe()
        self._channel = Channel(ours_in, ours_out)
        arguments = ["--requests", str(request_end), "--answers", str(answer_end)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megarl.rewards.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(request_end, answer_end),
                env=worker_environment(devices),
                start_new_session=True,  # so that everything it starts can be killed with it
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            os.close(request_end)
            os.close(answer_end)
        self._printing = threading.Thread(target=self._output.pass_on, args=(self._process.stdout,), daemon=True)
        self._printing.start()

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def request(self, payload: bytes, timeout_s: float) -> dict[str, Any]:
        """Send a frame and wait for the response.

        Raises:
            CallFailedError: the response is a failure, or there is none because the process is late or has ended. In
                the latter two cases, and after any other exception, the process is dead.
        """
        try:
            check = self._watch(timeout_s)
            self._channel.send(payload, check)
            answer = parse_object(self._channel.receive(check))
        except PipeClosed as error:
            death = self.death()
            self.kill()
            raise CallFailedError(f"ended its process ({death})", "died") from error
        except UnreadableError as error:
            self.kill()
            raise CallFailedError(f"wrote invalid data into its response pipe, which {error}", "died") from error
        except BaseException:  # the connection is unusable after an interrupted call
            self.kill()
            raise
        if "failure" in answer:
            _log.debug("%s\n%s", self._name, answer["traceback"])
            raise CallFailedError(_shortened(answer["failure"]), answer["kind"], answer["where"])
        return answer

    def close(self) -> None:
        """Stop the process. The function may clean up; what still runs two seconds later is killed."""
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self.kill()

    def kill(self) -> None:
        """Kill the process and everything that it started."""
        self._channel.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pid = self._process.pid
            _log.warning("the process of %s (pid %d) does not die; continuing without it", self._name, pid)
        self._printing.join(timeout=1)
        self._output.end_call()

    def death(self) -> str:
        """Return how the process ended, and the last line that it printed."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        how = f"exit code {code}"
        if code < 0:
            memory = ", which may mean that memory ran out" if code == -signal.SIGKILL else ""
            how = f"killed by {_signal_name(-code)}{memory}"
        self._printing.join(timeout=0.5)
        return f"{how}; its last line: {self._output.last[:200]}" if self._output.last else how

    def _watch(self, timeout_s: float) -> Callable[[], None]:
        """Return a check that ends a wait: after the timeout, or if the worker is dead while a process that it started
        still holds the pipe."""
        deadline = time.monotonic() + timeout_s

        def check() -> None:
            if time.monotonic() > deadline:
                printed = f" while it printed {self._output.lines:,} lines" if self._output.unlogged else ""
                raise CallFailedError(f"did not finish within {timeout_s:g} s{printed} and was killed", "late")
            if not self.alive:
                raise PipeClosed

        return check


def worker_environment(devices: str | None = "") -> dict[str, str]:
    """Return this process's environment without the variables that would make the worker part of the run.

    Args:
        devices: CUDA_VISIBLE_DEVICES of the worker; "" hides every GPU, None keeps this process's.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in DISTRIBUTED and not name.startswith(DISTRIBUTED_PREFIXES)
    }
    if devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = devices
    if (terminal := _terminal()) is not None:
        kept.setdefault(TERMINAL, terminal)
    kept.setdefault("PYTHONHASHSEED", "0")  # so that functions that iterate over sets return the same scores
    home = Path(megarl.__file__).resolve().parent.parent
    if home.name not in ("site-packages", "dist-packages"):
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    return kept


def _terminal() -> str | None:
    """Return the path of the terminal of this process, None if it has none, or one without a name here (as in a
    container whose terminal belongs to its host)."""
    try:
        return os.ttyname(sys.stdin.fileno()) if sys.stdin is not None and sys.stdin.isatty() else None
    except (OSError, ValueError):  # ValueError: stdin is closed
        return None


class Output:
    """The output of a worker, on its way to the log: the first lines of every call, and the number of the others.

    The pipe is read as fast as it fills, so that no function waits for the log.

    Attributes:
        lines: number of lines printed since the call began.
        unlogged: number of these lines that were not logged.
        last: the last line that is not empty.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.lines = self.unlogged = self._logged = 0
        self.last = ""

    def end_call(self) -> None:
        """Log how many lines were not logged, and reset the counts."""
        if self.unlogged:
            _log.info("%s printed %s more lines in this call, which are not logged", self._name, f"{self.unlogged:,}")
        self.lines = self.unlogged = self._logged = 0

    def pass_on(self, stream: IO[bytes]) -> None:
        """Read the output and log it until the worker's process has ended."""
        rest = b""
        with stream:
            while block := stream.read1(_BLOCK):  # type: ignore[attr-defined]
                *whole, rest = (rest + block).split(b"\n")
                while len(rest) > _LONGEST_LINE:
                    whole, rest = [*whole, rest[:_LONGEST_LINE]], rest[_LONGEST_LINE:]
                self._take(whole)
            self._take([rest])

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            if line.endswith(END_OF_CALL):
                self._take([line.removesuffix(END_OF_CALL)] if line != END_OF_CALL else [])
                self.end_call()
                continue
            if self.lines >= MOST_LINES or self._logged >= _MOST_BYTES:
                self.unlogged += 1
            elif text := printable(line.decode("utf-8", errors="replace").rstrip()):
                self._logged += len(line)
                for start in range(0, len(text), _LONGEST_LINE):
                    _log.info("%s: %s", self._name, text[start : start + _LONGEST_LINE])
            self.lines += 1
        last = next((line for line in reversed(lines) if line.strip() and not line.endswith(END_OF_CALL)), None)
        if last is not None:
            self.last = last[:_LONGEST_LINE].decode("utf-8", errors="replace").strip()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
