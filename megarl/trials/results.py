"""What a run measured: a metric of its summary.json, and tables of many."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.disk import UnreadableError, parse_object, read_text
from megarl.errors import ConfigError, DataError


def metrics_of(run: Path, value: str = "last") -> dict[str, float]:
    """Return a value (first, last, best or last5) of every metric that a run has logged. Raise `DataError` if it has no
    summary."""
    path = run / "summary.json"
    try:
        metrics = parse_object(read_text(path)).get("metrics")
    except UnreadableError as problem:
        raise DataError(f"{path} {problem}", where=path) from None
    found = {name: series.get(value) for name, series in metrics.items()} if isinstance(metrics, dict) else {}
    return {name: float(one) for name, one in found.items() if isinstance(one, int | float)}


def metric_of(run: Path, metric: str, value: str = "last", key: str = "sweep.metric") -> float | None:
    """Return a value of a run's metric; None if it is not finite. Raise if the run has no such metric."""
    found = metrics_of(run, value)
    if metric in found:
        return found[metric] if math.isfinite(found[metric]) else None
    near = difflib.get_close_matches(metric, found, n=1, cutoff=0.4)
    meant = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{key}={metric} is not among the metrics of {run}: {meant}it has {', '.join(sorted(found)) or 'none'}",
        key=key,
        value=metric,
        offers={key: near or sorted(found)},
        where=run,
    )


def last_error(log: Path) -> str:
    """Return the last line of a log that starts with "error: ", without that; empty if there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition("error: ")[2] for line in reversed(lines) if line.startswith("error: ")), "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with aligned columns; columns of numbers are aligned at the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    right = [all(_is_number(row[index]) for row in rows) for index in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines) + "\n"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("", "-")
    return True


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV, with a column for every key that one of them has."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
