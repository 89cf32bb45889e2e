"""metrics.csv: one row per step, one column per metric, in the run folder, also when the run is resumed."""

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
    """A Lightning logger that keeps a whole run, resumed or not, in one table.

    Lightning's own starts a file anew per version and writes a step's training and evaluation metrics into separate
    rows. Here values of a step join its row; a step that is logged again, as after a resume from an older checkpoint,
    replaces its values; rows of other steps stay. Every value is on disk when `log_metrics` returns.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] | None = None  # read from the file when first needed
        self._last: Row = {}
        self._last_at = 0  # byte where the last row begins

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: a table of metrics has no place for them, config.yaml lies beside it."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = int(step or 0)  # Lightning before 2.5 passes the `step` of `StepAxis` on as the float it was logged as
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
            whole = text[: text.rfind("\n") + 1]  # a line without its end was cut off by a crash
            reader = csv.DictReader(io.StringIO(whole, newline=""))
            rows = [{name: value for name, value in row.items() if name and value} for row in reader]
            return list(reader.fieldnames or []), [
                row for row in rows if re.fullmatch("[0-9]{1,18}", row.get(_STEP, ""))
            ]
        except (UnreadableError, csv.Error) as problem:
            raise DataError(
                f"{self.path} {problem}: move it away, and the run begins another", where=self.path
            ) from None

    def _rewrite(self, row: Row) -> None:
        """Put a row where it belongs, by step, with columns for what it brings."""
        columns, rows = self._read()
        columns += [name for name in row if name not in columns]
        # The step first, the rest in alphabetical order: the same table whatever was logged first.
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
        """Write the last row without touching those before it."""
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
    """A number such that reading it gives the same number."""
    item = value.item() if hasattr(value, "item") else value
    return repr(item) if isinstance(item, float) else str(item)
