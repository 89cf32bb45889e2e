"""Frames over a pair of pipes between a run and its reward worker. The content of a frame is bytes here."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable

LOOK_UP_S = 0.2
"""Seconds of waiting between two calls of `check`."""

END_OF_CALL = b"\x00end of call\x00"
"""What a worker writes after the output of a call, with a line end."""

_HEADER = struct.Struct("<Q")
_CHUNK = 1 << 20

Check = Callable[[], None]


class PipeClosed(Exception):  # noqa: N818 - for the worker it is the normal end
    """The other side closed its end of the pipe, or ended."""


class Channel:
    """One side of the connection.

    Both descriptors are non-blocking, so that a stopped reader or writer on the other side cannot block this side for
    longer than `check` allows.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)

    def send(self, payload: bytes, check: Check) -> None:
        """Write one frame. `check` is called during waits; an exception from it ends the wait."""
        rest = memoryview(_HEADER.pack(len(payload)) + payload)
        while rest:
            _wait(self._write_fd, select.POLLOUT, check)
            try:
                rest = rest[os.write(self._write_fd, rest[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise PipeClosed from error

    def receive(self, check: Check) -> bytes:
        """Read one frame. `check` is called during waits; an exception from it ends the wait."""
        (length,) = _HEADER.unpack(self._read(_HEADER.size, check))
        return self._read(length, check)

    def close(self) -> None:
        """Close both descriptors; the other side reads the end of the file."""
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1

    def _read(self, length: int, check: Check) -> bytes:
        got = bytearray()
        while len(got) < length:
            _wait(self._read_fd, select.POLLIN, check)
            try:
                piece = os.read(self._read_fd, min(length - len(got), _CHUNK))
            except BlockingIOError:
                continue
            if not piece:
                raise PipeClosed
            got += piece
        return bytes(got)


def _wait(fd: int, event: int, check: Check) -> None:
    """Return when the descriptor is ready or closed. Uses `poll`, as `select` fails on descriptors above 1023."""
    poll = select.poll()
    poll.register(fd, event)
    while not poll.poll(LOOK_UP_S * 1000):
        check()
