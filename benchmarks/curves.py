"""Draws the curves of docs/: for each algorithm, its score on small tasks, from the runs in
benchmarks/results/sweeps.jsonl.

    python -m benchmarks.curves            # writes docs/curves/*.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweeps import PRESETS, SWEEPS, Case, known
from megarl.report.draw import HEIGHT, WIDTH, Chart, Line

FOLDER = Path(__file__).parents[1] / "docs" / "curves"
GAP = 16
"""Space between panels, and around them, in the units of a drawing."""
EVERY = {"randomwalks": 1, "arithmetic": 20, "randomwalks, offline": 10}
"""Phases, or steps, from one evaluation to the next, by task."""
SWEPT = {"randomwalks": ("on_policy", "ppo", "grpo"), "arithmetic": ("arithmetic",), "randomwalks, offline": ("ilql",)}
"""Which sweeps have the runs of a task."""
STYLE = """
svg{color:#24292f;font:12px system-ui,sans-serif}
.paper{fill:#fff}.tick,.title{fill:currentColor}.title{font-size:13px}.tick{font-size:11px}
.grid{stroke:#d0d7de;fill:none}.axis{stroke:#8c959f;fill:none}
.line{fill:none;stroke:#0a58ca;stroke-width:1}.line.s0{stroke-width:2.5}.line.s1{opacity:.6;stroke-dasharray:4 3}
.mark{fill:#0a58ca}.mark.s1{display:none}
@media (prefers-color-scheme:dark){svg{color:#e6edf3}.paper{fill:#161b22}.grid{stroke:#30363d}.axis{stroke:#6e7681}
.line{stroke:#79b8ff}.mark{fill:#79b8ff}}
"""
"""The colours of a picture: it has a ground of its own, so that it is readable on any page."""


@dataclass(frozen=True)
class Panel:
    """Runs of one task: the values of each run, evaluated before training and after every `EVERY` phases."""

    task: str
    runs: Sequence[Sequence[float]]

    def band(self) -> list[tuple[float, float, float]]:
        """Return the mean, the least and the largest value of each evaluation."""
        columns = list(zip(*self.runs, strict=True))
        return [(sum(column) / len(column), min(column), max(column)) for column in columns]

    def draw(self, name: str, left: float) -> str:
        """Return the panel as elements of an SVG: the mean of the runs, and dashed the least and the largest.

        Args:
            name: of the algorithm.
            left: where it begins in the picture.
        """
        points = [(index * EVERY[self.task], values) for index, values in enumerate(self.band())]
        lines = [
            Line(label, [(step, values[column]) for step, values in points], style)
            for column, (label, style) in enumerate((("mean", 0), ("least", 1), ("largest", 1)))
        ]
        title = f"{self.task}, {len(self.runs)} runs"
        unit = "step" if "offline" in self.task else "phase"
        identifier = re.sub(r"[^a-z0-9]+", "-", f"{name} {self.task}".lower())
        drawn = Chart(identifier, f"{name} on {title}", unit, lines).svg()
        placed = drawn.replace("<svg ", f'<svg x="{left}" y="24" width="{WIDTH}" height="{HEIGHT}" ', 1)
        return f'<text class="title" x="{left + WIDTH / 2}" y="18" text-anchor="middle">{title}</text>{placed}'


def draw(name: str, panels: Sequence[Panel]) -> str:
    """Return an SVG with the panels of an algorithm beside each other."""
    width, height = len(panels) * (WIDTH + GAP) + GAP, HEIGHT + 24 + GAP
    drawn = "".join(panel.draw(name, GAP + index * (WIDTH + GAP)) for index, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<style>{STYLE}</style><rect class="paper" width="{width}" height="{height}" rx="8"/>{drawn}</svg>\n'
    )


def algorithm(case: Case) -> str:
    """Return the name of the algorithm that a case runs: its preset's, else its entry point's with what the settings
    change of it."""
    preset = case.preset.strip("[]").partition(",")[2]
    own = f"ppo.advantages={case.entry}"
    changed = [part for part in case.settings if part.startswith("ppo.advantages=") and part != own]
    return preset or " ".join([case.entry, *changed])


Name = tuple[str, str, tuple[str, ...]]


def finished_runs() -> dict[Name, dict[str, Any]]:
    """Return the lines of the results by entry point, preset and settings, as they were measured.

    What a run was called says what it was, whatever keys megarl has now.
    """
    return {(line["entry"], line["preset"], tuple(line["settings"])): line for line in known().values()}


def panels_of(name: str, lines: Mapping[Name, Mapping[str, Any]], cases: Mapping[str, Sequence[Case]]) -> list[Panel]:
    """Return a panel for each task that has runs of an algorithm.

    Args:
        name: the algorithm.
        lines: finished runs.
        cases: all cases by task.
    """
    panels = []
    for task, some in cases.items():
        own = [case for case in some if algorithm(case) == name]
        found = [(case, lines.get((case.entry, case.preset, tuple(case.settings)))) for case in own]
        runs = [line["series"][case.metric] for case, line in found if line is not None]
        if runs:
            panels.append(Panel(task, runs))
    return panels


def curves(names: Iterable[str] = ("ppo", "grpo", "ilql", *PRESETS)) -> dict[str, str]:
    """Return the SVG of each algorithm that has runs, by its name."""
    cases = {task: [case for sweep in sweeps for case in SWEEPS[sweep]()] for task, sweeps in SWEPT.items()}
    found = {name: panels_of(name, finished_runs(), cases) for name in names}
    return {name: draw(name, panels) for name, panels in found.items() if panels}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, text in curves().items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
        print(f"docs/curves/{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
