"""Follows the files of a run folder: reads what has changed since the last time, and keeps what is gone."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.disk import exists
from megarl.report.data import FILES, METRICS, parse_rows, run_data
from megarl.report.findings import FILE as FINDINGS
from megarl.report.scores import score_folders

Stamp = tuple[int, ...] | None
"""What changes when a file is written; None while there is no file."""
_VERIFY_S = 30.0


class MetricsTable:
    """The rows of a metrics.csv that another process writes.

    megarl appends rows, writes the last one again in its place, and replaces the file to insert rows or columns; other
    loggers write the whole file anew. So what follows the last row but one is read at each change, and the whole file
    where its beginning is not the one that was read. Every half minute in which something was appended, a checksum
    tells whether an earlier row was changed in place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.changed: dict[str, int] = {}
        """For each metric, the number of the last reading in which any of its values was new or different."""
        self.readings = 0
        self.problem: str | None = None
        """Why the file cannot be read, as a sentence."""
        self._stamp: Stamp = None
        self._inode = -1
        self._header = b""
        self._settled_rows = 0
        self._settled_bytes = 0  # the header and the settled rows: all but the last one
        self._settled_end = b""  # the last line of them
        self._checksum = 0  # of them
        self._verified_at = 0.0
        self._verified = True

    def poll(self) -> bool:
        """Read what is new. Return whether anything is. A file that is no table leaves the rows as they were."""
        stamp = stamp_of(self.path)
        if stamp is None or (stamp == self._stamp and not self._must_verify()):
            return False
        self._verified &= stamp == self._stamp
        self._stamp = stamp
        rows, problem = self.rows, self.problem
        try:
            with self.path.open("rb") as file:
                data = self._read_end(file.fileno()) if self._inode == os.fstat(file.fileno()).st_ino else None
                if data is None:
                    file.seek(0)
                    self._inode, whole = os.fstat(file.fileno()).st_ino, file.read()
            changed = self._take_all(whole) if data is None else self._take_end(data)
            self.problem = None
        except (OSError, ValueError) as raised:
            self.rows, self._inode, changed = rows, -1, False  # the next reading is of the whole file
            if isinstance(raised, OSError):  # it may be over the next time, though the file is the same
                self._stamp = None
            self.problem = f"{self.path.name} cannot be read ({getattr(raised, 'strerror', None) or raised})."
        return changed or self.problem != problem

    def _must_verify(self) -> bool:
        return not self._verified and time.monotonic() - self._verified_at > _VERIFY_S

    def _read_end(self, file: int) -> bytes | None:
        """Return what follows the settled rows; None if they are not what was read before."""
        if self._must_verify():
            settled = os.pread(file, self._settled_bytes, 0)
            if zlib.crc32(settled) != self._checksum:
                return None
            self._verified, self._verified_at = True, time.monotonic()
        elif os.pread(file, len(self._header), 0) != self._header:
            return None
        start = self._settled_bytes - len(self._settled_end)
        size = max(os.fstat(file).st_size - start, len(self._settled_end))
        end = os.pread(file, size, start)
        return end[len(self._settled_end) :] if end.startswith(self._settled_end) else None

    def _take_all(self, whole: bytes) -> bool:
        """Replace all rows by those of the whole file."""
        before = self.rows
        header, newline, rest = whole.partition(b"\n")
        if not newline:  # the first line is being written
            self._inode = -1
        self._header = header + newline if newline else b""
        self.rows, self._settled_rows, self._settled_bytes = [], 0, 0
        self._settle(self._header)
        self._verified, self._verified_at = True, time.monotonic()
        self._append(rest)
        return self._compare(before, self.rows)

    def _take_end(self, end: bytes) -> bool:
        """Replace the last row, which may have been written again, and append those that follow it."""
        if b"\n" not in end:  # a line that is being written
            return False
        before = self.rows[self._settled_rows :]
        first = self._settled_rows
        self._append(end)
        return self._compare(before, self.rows[first:])

    def _append(self, lines: bytes) -> None:
        """Take the whole lines that follow the settled rows; the last one stays open to be replaced."""
        whole = lines[: lines.rfind(b"\n") + 1]
        settled = whole[: whole[:-1].rfind(b"\n") + 1]
        header = self._header.decode()
        new, last = (parse_rows(header + part.decode()) for part in (settled, whole[len(settled) :]))
        self.rows = [*self.rows[: self._settled_rows], *new, *last]
        self._settled_rows += len(new)
        if settled:
            self._settle(settled)

    def _settle(self, lines: bytes) -> None:
        self._checksum = zlib.crc32(lines, self._checksum if self._settled_bytes else 0)
        self._settled_bytes += len(lines)
        self._settled_end = lines[lines[:-1].rfind(b"\n") + 1 :]

    def _compare(self, before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> bool:
        """Note which metrics differ. Return whether any does."""
        shared = min(len(before), len(after))
        names = set(_names([*before[shared:], *after[shared:]]))
        for old, new in zip(before, after, strict=False):
            if old != new:
                names |= {name for name in (*old, *new) if old.get(name) != new.get(name)}
        if not names:
            return False
        self.readings += 1
        self.changed.update(dict.fromkeys(names, self.readings))
        return True


class RunFollower:
    """The data of a run whose folder changes. A file that is gone keeps the content that was last read of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = MetricsTable(folder / METRICS)
        self.stamps: dict[str, Stamp] = {}
        """What was last seen of each file beside the metrics, and of the folders with scores under "scores"."""
        self.problem: str | None = None
        """A sentence about what cannot be followed at present."""
        self._contents: dict[str, Any] = {}
        for name, read in FILES.items():
            self.stamps[name] = stamp_of(folder / name)
            self._contents[name] = read(folder / name)
        self.data = run_data(folder, [], self._contents)

    def poll(self) -> bool:
        """Read what has changed since the last time. Return whether anything has."""
        changed, before = self.metrics.poll(), self.problem
        self.problem = self._problem()
        changed |= self.problem != before
        for name, read in FILES.items():
            if self._is_new(name, stamp_of(self.folder / name)):
                self._contents[name] = read(self.folder / name)
                changed = True
        changed |= self._is_new(FINDINGS, stamp_of(self.folder / FINDINGS))
        if changed:
            self.data = run_data(self.folder, self.metrics.rows, self._contents)
        scores = [part for folder in score_folders(self.data) for part in stamp_of(folder) or ()]
        return self._is_new("scores", tuple(scores) or None) or changed

    def _is_new(self, name: str, stamp: Stamp) -> bool:
        """Note a stamp. Return whether it tells of new content."""
        if stamp is None or self.stamps.get(name) == stamp:
            return False
        self.stamps[name] = stamp
        return True

    def _problem(self) -> str | None:
        if not exists(self.folder):
            return "The run folder is gone. This page shows what was last read from it."
        if self.metrics.rows and not exists(self.metrics.path):
            return f"{METRICS} is gone. This page shows what was last read from it."
        return self.metrics.problem


def stamp_of(path: Path) -> Stamp:
    """Return what changes when a file is written, or an entry of a folder added."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _names(rows: Iterable[Mapping[str, float]]) -> Iterable[str]:
    return (name for row in rows for name in row)
