"""Made-up runs for tests of findings: series of metrics from step 1 on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.report.data import RunData
from megarl.report.finding import Finding
from megarl.report.findings import FINDERS


def made_up(
    series: Mapping[str, Sequence[float]],
    config: Mapping[str, Any] | None = None,
    *,
    samples: Sequence[Mapping[str, Any]] = (),
    summary: Mapping[str, Any] | None = None,
    every: int = 1,
) -> RunData:
    """A run with these metrics, one value per step that is logged; shorter series end earlier."""
    length = max((len(values) for values in series.values()), default=0)
    rows = [
        {"step": (i + 1) * every, **{name: float(values[i]) for name, values in series.items() if i < len(values)}}
        for i in range(length)
    ]
    return RunData(Path("run"), config or {}, rows, summary or {}, samples)


def found(name: str, data: RunData) -> Finding | None:
    return FINDERS[name](data)


def line(first: float, last: float, count: int) -> list[float]:
    """Numbers at equal distances."""
    return [first + (last - first) * i / (count - 1) for i in range(count)]
