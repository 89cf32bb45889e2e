"""Programs on a terminal of their own, driven by a test."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping


class Terminal:
    """A program on a terminal of its own."""

    def __init__(
        self, command: list[str], *, columns: int = 80, lines: int = 24, environ: Mapping[str, str] | None = None
    ) -> None:
        self.fd, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, start_new_session=True, env=environ and dict(environ)
        )
        os.close(far)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 120.0) -> str:
        """Return what was printed until a pattern appeared."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"no {pattern!r} in {self.seen!r}")
            if select.select([self.fd], [], [], 0.5)[0]:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def rest(self) -> str:
        """Return what is printed until the program has ended."""
        try:
            while piece := os.read(self.fd, 65536):
                self.seen += piece.decode("utf-8", "replace")
        except OSError:  # Linux says so that the other end is closed
            pass
        return self.seen

    def type(self, line: str) -> None:
        os.write(self.fd, f"{line}\n".encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End the program if it has not ended."""
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def screen_after(printed: str, columns: int, lines: int) -> list[str]:
    """Return what stands on a terminal, and above it in its scrollback, after a program has printed this: as much of a
    terminal as the displays use."""
    rows, row, column = [""], 0, 0
    for control, plain in re.findall("(\x1b\\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", printed):
        if plain:
            for letter in plain:
                if column == columns:  # a line that is too wide goes on below
                    row, column = row + 1, 0
                    rows += [""] * (row + 1 - len(rows))
                rows[row] = rows[row][:column].ljust(column) + letter + rows[row][column + 1 :]
                column += 1
        elif control == "\r":
            column = 0
        elif control == "\n":  # which terminals take for both
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif control.endswith("A"):
            row -= int(control[2:-1] or 1)
            assert row >= max(0, len(rows) - lines), "the cursor went above the screen"
        elif control == "\x1b[2K":
            rows[row] = ""
    return rows
