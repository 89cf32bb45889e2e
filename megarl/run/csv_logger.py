"""metrics.csv in the run folder: one row per step and one column per metric, also across resumes."""

import csv
import io
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from megarl.disk import UnreadableError, read_text, write_atomically
from megarl.errors import DataError

_STEP = "step"
Row = dict[str, str]


class MetricsFile(Logger):
    """A Lightning logger that writes all metrics of a run, also after resumes, into one table.

    Lightning's own CSV logger starts a new file per version and writes the training and evaluation metrics of a step
    into separate rows. Here all values of a step share a row. A step that is logged again, as after a resume from an
    older checkpoint, replaces its values; rows of other steps stay. Every value is on disk when `log_metrics` returns.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] | None = None  # read from the file on first use
        self._last: Row = {}
        self._last_at = 0  # byte offset of the last row

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Empty: all processes of a run share one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in config.yaml beside the table."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the metrics into the row of the step, with new columns where they are needed."""
        step = int(step or 0)  # Lightning before 2.5 passes the `step` that `StepAxis` logs as a float
        row = {_STEP: str(step), **{name: _text(value) for name, value in metrics.items()}}
        if self._columns is None:
            self._open()
        assert self._columns is not None
        last = int(self._last[_STEP]) if self._last else -1
        if set(row) <= set(self._columns) and step >= last:
            self._put_last({**self._last, **row} if step == last else row, replace=step == last)
        else:
            self._rewrite(row)

    def _open(self) -> None:
        """Read the columns and the last row of an earlier process's file."""
        columns, rows = self._read()
        self._columns = columns
        if columns:
            self._store(rows)

    def _read(self) -> tuple[list[str], list[Row]]:
        if not self.path.exists():
            return [], []
        try:
            text = read_text(self.path)
            whole = text[: text.rfind("\n") + 1]  # drop a line without an end, which a crash left
            reader = csv.DictReader(io.StringIO(whole, newline=""))
            rows = [{name: value for name, value in row.items() if name and value} for row in reader]
            return list(reader.fieldnames or []), [
                row for row in rows if re.fullmatch("[0-9]{1,18}", row.get(_STEP, ""))
            ]
        except (UnreadableError, csv.Error) as problem:
            raise DataError(
                f"{self.path} {problem}: move it away, and the run starts a new one", where=self.path
            ) from None

    def _rewrite(self, row: Row) -> None:
        """Insert or update a row, sorted by step, and add columns for its new metrics."""
        columns, rows = self._read()
        columns += [name for name in row if name not in columns]
        # The step, then the metrics in alphabetical order, so that the order of logging does not matter.
        self._columns = [_STEP, *sorted(name for name in columns if name != _STEP)]
        table = {int(old[_STEP]): old for old in rows}
        table[int(row[_STEP])] = {**table.get(int(row[_STEP]), {}), **row}
        self._store([table[step] for step in sorted(table)])

    def _store(self, rows: list[Row]) -> None:
        assert self._columns is not None
        head = self._line({name: name for name in self._columns})
        lines = [self._line(row) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join([head, *lines]))
        self._last = rows[-1] if rows else {}
        self._last_at = self.path.stat().st_size - (len(lines[-1].encode()) if lines else 0)

    def _put_last(self, row: Row, replace: bool) -> None:
        """Append the last row, or replace it, without touching the rows before it."""
        with self.path.open("r+b") as file:
            if replace:
                file.seek(self._last_at)
                file.truncate()
            else:
                self._last_at = file.seek(0, os.SEEK_END)
            file.write(self._line(row).encode())
        self._last = row

    def _line(self, row: Row) -> str:
        assert self._columns is not None
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        return line.getvalue()


def _text(value: Any) -> str:
    """Format a number so that reading it returns the same number."""
    item = value.item() if hasattr(value, "item") else value
    return repr(item) if isinstance(item, float) else str(item)
