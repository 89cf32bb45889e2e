"""A metric of a finished run as a small chart for the terminal: `python -m megarl.run.curve RUN METRIC`.

It reads metrics.csv alone, so that it needs neither torch nor Lightning.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from megarl.command import run_command
from megarl.disk import UnreadableError, read_text, shown
from megarl.errors import ConfigError, DataError

_ROWS, _COLUMNS = 8, 60
Points = Sequence[tuple[int, float]]


def main() -> None:
    """Print the chart of the run and the metric that the command line names, and the path of all metrics."""
    run_command(lambda: _run(sys.argv[1:]))


def _run(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        raise ConfigError(
            "write megarl.run.curve RUN METRIC: the folder of a run and a metric, as in runs/demo eval/score", key="RUN"
        )
    path = Path(argv[0]) / "metrics.csv"
    points = read_metric(path, argv[1])
    sys.stdout.write(f"{argv[1]} by step\n{chart(points)}\nall metrics: {path}\n")
    return 0


def read_metric(path: Path, name: str) -> list[tuple[int, float]]:
    """Return the steps at which a metric was measured, with its finite values."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = list(reader)
    except (UnreadableError, csv.Error) as problem:
        raise DataError(f"{path} {problem}: name the folder of a run", where=path) from None
    names = reader.fieldnames or []
    if name not in names:
        known = [each for each in names if each.startswith("eval/")] or names
        raise ConfigError(
            f"METRIC={shown(name)} is not in {path}: it has {', '.join(known)}",
            key="METRIC",
            value=name,
            where=path,
            offers={"METRIC": list(known)},
        )
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        raise DataError(f"{path} has no value of '{shown(name)}' yet: wait for the run's first", where=path)
    return finite


def chart(points: Points) -> str:
    """Draw values over steps: a column for each value, or for several of a long run with their mean."""
    columns = _columns(points)
    means = [sum(value for _, value in column) / len(column) for column in columns]
    low, high = min(means), max(means)
    size = high - low or 1.0
    heights = [round((value - low) / size * (_ROWS - 1)) for value in means]
    lines = []
    for row in range(_ROWS - 1, -1, -1):
        label = f"{low + size * row / (_ROWS - 1):8.3g}" if row in (0, _ROWS - 1) else " " * 8
        marks = "".join("*" if height == row else "." if height > row else " " for height in heights)
        lines.append(f"{label} |{marks}".rstrip())
    first, last = points[0], points[-1]
    lines.append(f"step {first[0]}: {first[1]:.3g}   step {last[0]}: {last[1]:.3g}")
    return "\n".join(lines)


def _columns(points: Points) -> list[Points]:
    """Cut the values into at most as many parts as the chart has columns."""
    count = min(len(points), _COLUMNS)
    edges = [index * len(points) // count for index in range(count + 1)]
    return [points[start:end] for start, end in pairwise(edges)]


if __name__ == "__main__":
    main()
