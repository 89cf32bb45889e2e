"""The data of a run, read from its folder: metrics, configuration, samples. Nothing heavy is imported for it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarl.disk import UnreadableError, check_yaml, parse_object, read_text
from megarl.errors import DataError

METRICS = "metrics.csv"
ENDED = ("finished", "stopped", "interrupted", "failed")
"""Values of `status` in summary.json of a run that has ended."""
Point = tuple[int, float]
"""A step (or phase) and a value."""

_TOO_LARGE = 1e300


@dataclass(frozen=True)
class RunData:
    """A run, finished or not.

    Attributes:
        path: its folder.
        config: its resolved configuration, as plain values.
        rows: the logged metrics, a mapping for each step that has any; "step" is among them.
        summary: content of summary.json; empty while there is none.
        samples: rows of the tables that evaluations showed, with the step under "step" or "phase".
        traces: records of the tokens of a few responses, with the phase under "phase".
        entry: name of the algorithm; empty where nothing says it.
        versions: content of versions.json.
        git: content of git.json.
    """

    path: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    entry: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    git: Mapping[str, Any] = field(default_factory=dict)
    traces: Sequence[Mapping[str, Any]] = ()

    @property
    def unit(self) -> str:
        """What a step is called: phase or step."""
        return "phase" if self.has_phases else "step"

    @property
    def has_phases(self) -> bool:
        """Whether the run generates responses in phases."""
        trainer = self.config.get("trainer")
        return isinstance(trainer, Mapping) and "max_phases" in trainer

    def series(self, metric: str) -> list[Point]:
        """Return the finite values of a metric, in the order of the steps."""
        found = [(int(row["step"]), row[metric]) for row in self.rows if metric in row]
        return [(step, value) for step, value in found if math.isfinite(value)]

    def not_finite(self, metric: str) -> list[int]:
        """Return the steps at which a metric was NaN or infinite."""
        return [int(row["step"]) for row in self.rows if metric in row and not math.isfinite(row[metric])]

    def metrics(self) -> list[str]:
        """Return the names of all metrics, sorted."""
        return sorted(set().union(*self.rows) - {"step"})

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted configuration key; `default` where the run has no such key or it is null."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """Return the value of a dotted configuration key; None where the run has no such key, or no number there."""
        return as_number(self.setting(key))


def as_number(value: Any) -> float | None:
    """Return a value as a number; None if it is none, or too large to count with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _TOO_LARGE:
        return None
    return float(value)


def read_run(path: Path) -> RunData:
    """Return the data of a run folder. Raise `DataError` if it is none."""
    metrics = path / METRICS
    try:
        text = read_text(metrics)
        rows = parse_rows(text[: text.rfind("\n") + 1])  # without a line that is being written, or that a crash left
    except ValueError as problem:
        raise DataError(
            f"{metrics} {problem}: name the folder of a run, which logs with logger.csv=true", where=metrics
        ) from None
    return run_data(path, rows, {name: read(path / name) for name, read in FILES.items()})


def run_data(path: Path, rows: Sequence[Mapping[str, float]], contents: Mapping[str, Any]) -> RunData:
    """Return the data of a run from its metrics and the contents of its other files, by the names of `FILES`."""
    summary = contents["summary.json"]
    entry, last = summary.get("algorithm"), _last_step(summary)
    return RunData(
        path,
        contents["config.yaml"],
        sorted((row for row in rows if row["step"] <= last), key=lambda row: row["step"]),
        summary,
        _until(last, contents["samples.jsonl"]),
        entry if isinstance(entry, str) else "",
        contents["versions.json"],
        contents["git.json"],
        _until(last, contents["tokens.jsonl"]),
    )


def _last_step(summary: Mapping[str, Any]) -> float:
    """Return the last step of a run that has ended. What the folder has beyond it is of an attempt from which the run
    was resumed at an earlier step."""
    steps = as_number(summary.get("steps"))
    return steps if steps is not None and summary.get("status") in ENDED else math.inf


def _until(last: float, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records up to a step."""
    return [record for record in records if not (as_number(step_of(record)) or 0.0) > last]


def step_of(record: Mapping[str, Any]) -> Any:
    """Return the step of a record of samples.jsonl or tokens.jsonl, or its phase."""
    return next((record[name] for name in ("phase", "step") if name in record), None)


def parse_rows(text: str) -> list[dict[str, float]]:
    """Return the rows of a table of metrics that have a step. Raise ValueError if a value is not a number."""
    try:
        rows = [_numbers(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    except csv.Error as problem:
        raise UnreadableError(str(problem)) from None
    return [row for row in rows if _is_step(row.get("step"))]


def _numbers(row: Mapping[str | None, Any]) -> dict[str, float]:
    """Return the values of a line of the table. A line with more values than the table has columns keeps the others."""
    return {name: float(value) for name, value in row.items() if name and value}


def _is_step(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value >= 0


def _object(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_text(path))
    except UnreadableError:
        return {}


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = read_text(path)
        check_yaml(text)
        found = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):  # also a date or a number that YAML cannot hold
        return {}
    return found if isinstance(found, dict) else {}


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_text(path).splitlines()
    except UnreadableError:
        return []
    found = []
    for line in lines:
        try:
            found.append(parse_object(line))
        except UnreadableError:  # a line that is being written
            continue
    return found


FILES: dict[str, Callable[[Path], Any]] = {
    "config.yaml": _config,
    "summary.json": _object,
    "samples.jsonl": _records,
    "versions.json": _object,
    "git.json": _object,
    "tokens.jsonl": _records,
}
"""The files of a run that are read beside its metrics, and how. One that is missing or damaged counts as empty."""
