"""Commands of megarl in processes of their own that begin with everything imported, as copies of one process.

What is not checked here is that a fresh interpreter finds and imports a command: one test of each command starts one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.worlds import forked


def _become(module: str, arguments: tuple[str, ...], folder: str, environ: dict[str, str], written: str) -> None:
    """Run a module as `python -m` does, with standard output and error in files named `written`.out and .err."""
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{written}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()  # what it starts ends with it
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a forked process does not run by itself


class Program:
    """A running `python -m MODULE ARGUMENTS`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, module: str, *arguments: str, folder: Path | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        self._texts = tempfile.TemporaryDirectory()
        self._written = f"{self._texts.name}/written"
        environ = {**os.environ, **(environ or {})}
        given = (module, arguments, str(folder or Path.cwd()), environ, self._written)
        self._process: Any = forked().Process(target=_become, args=given)
        self._process.start()
        atexit.register(self.end)  # of a test that failed; without it, this process would wait

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, the negative number of a signal that ended it, or None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 180.0) -> int:
        """Wait for the end; return the exit code."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            self.end()
            raise TimeoutError(f"no end within {timeout} s: {self.errors()}")
        return code

    def communicate(self, timeout: float = 180.0) -> tuple[str, str]:
        """Wait for the end; return what was written to standard output and standard error."""
        self.wait(timeout)
        return self.output(), self.errors()

    def first_line(self, timeout: float = 180.0) -> str:
        """Wait until the program has written a line to standard output or has ended; return the line."""
        end = time.monotonic() + timeout
        while "\n" not in self.output() and self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.output().partition("\n")[0]

    def end(self) -> None:
        """Kill the program and what it has started, if it has not ended."""
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def output(self) -> str:
        """What was written to standard output so far."""
        return self._text("out")

    def errors(self) -> str:
        """What was written to standard error so far."""
        return self._text("err")

    def _text(self, ending: str) -> str:
        path = Path(f"{self._written}.{ending}")
        return path.read_text(errors="replace") if path.exists() else ""
