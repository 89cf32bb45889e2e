"""Draws the curves of docs/: for each algorithm, its score on two small tasks, from the runs in
benchmarks/results/sweeps.jsonl.

    python -m benchmarks.curves            # writes docs/curves/*.svg
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sweeps import PRESETS, SWEEPS, Case, known

FOLDER = Path(__file__).parents[1] / "docs" / "curves"
WIDTH, HEIGHT, EDGE = 320, 200, 44  # pixels of a panel, and around it
EVERY = {"randomwalks": 1, "arithmetic": 20}  # phases from one evaluation to the next
SWEPT = {"randomwalks": ("on_policy", "ppo", "grpo"), "arithmetic": ("arithmetic",)}
"""Which sweeps have the runs of a task."""


@dataclass(frozen=True)
class Panel:
    """Runs of one task: the values of each run, evaluated before training and after every `EVERY` phases."""

    task: str
    runs: Sequence[Sequence[float]]

    def band(self) -> list[tuple[float, float, float]]:
        """Return the mean, the least and the largest value of each evaluation."""
        columns = list(zip(*self.runs, strict=True))
        return [(sum(column) / len(column), min(column), max(column)) for column in columns]

    def draw(self, left: float) -> str:
        """Return the panel as elements of an SVG."""
        band = self.band()

        def point(index: int, value: float) -> str:
            across = index / max(1, len(band) - 1)
            return f"{left + EDGE + across * WIDTH:.1f},{EDGE + (1 - value) * HEIGHT:.1f}"

        above = [point(index, most) for index, (_, _, most) in enumerate(band)]
        below = [point(index, least) for index, (_, least, _) in enumerate(band)]
        line = [point(index, mean) for index, (mean, _, _) in enumerate(band)]
        phases = (len(band) - 1) * EVERY[self.task]
        marks = "".join(
            f'<text x="{left + EDGE - 6}" y="{EDGE + (1 - value) * HEIGHT + 4:.0f}" text-anchor="end">{value:g}</text>'
            f'<text x="{left + EDGE + value * WIDTH:.0f}" y="{EDGE + HEIGHT + 16}" text-anchor="middle">'
            f"{value * phases:g}</text>"
            for value in (0.0, 0.5, 1.0)
        )
        title = f"{self.task}, {len(self.runs)} runs"
        return (
            f'<rect x="{left + EDGE}" y="{EDGE}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>'
            f'<polygon points="{" ".join([*above, *reversed(below)])}" fill="#1f77b4" opacity="0.25"/>'
            f'<polyline points="{" ".join(line)}" fill="none" stroke="#1f77b4" stroke-width="2"/>{marks}'
            f'<text x="{left + EDGE + WIDTH / 2}" y="{EDGE - 10}" text-anchor="middle">{title}</text>'
            f'<text x="{left + EDGE + WIDTH / 2}" y="{EDGE + HEIGHT + 34}" text-anchor="middle">phase</text>'
        )


def draw(panels: Sequence[Panel]) -> str:
    """Return an SVG with the panels beside each other: the mean of the runs, and the band from least to largest."""
    width, height = len(panels) * (WIDTH + 2 * EDGE), HEIGHT + 2 * EDGE
    drawn = "".join(panel.draw(number * (WIDTH + 2 * EDGE)) for number, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>{drawn}</svg>\n'
    )


def algorithm(case: Case) -> str:
    """Return the name of the algorithm that a case runs: its preset's, else its entry point's with what the settings
    change of it."""
    preset = case.preset.strip("[]").partition(",")[2]
    own = f"ppo.advantages={case.entry}"
    changed = [part for part in case.settings if part.startswith("ppo.advantages=") and part != own]
    return preset or " ".join([case.entry, *changed])


def panels_of(name: str, lines: dict[str, dict[str, object]], cases: dict[str, list[Case]]) -> list[Panel]:
    """Return a panel for each task that has runs of an algorithm.

    Args:
        name: the algorithm.
        lines: finished runs by fingerprint.
        cases: all cases by task.
    """
    panels = []
    for task, some in cases.items():
        own = [case for case in some if algorithm(case) == name]
        found = [(case, lines.get(case.fingerprint())) for case in own]
        runs = [line["series"][case.metric] for case, line in found if line is not None]  # type: ignore[index]
        if runs:
            panels.append(Panel(task, runs))
    return panels


def curves(names: Iterable[str] = ("ppo", "grpo", *PRESETS)) -> dict[str, str]:
    """Return the SVG of each algorithm that has runs, by its name."""
    cases = {task: [case for sweep in sweeps for case in SWEEPS[sweep]()] for task, sweeps in SWEPT.items()}
    found = {name: panels_of(name, known(), cases) for name in names}
    return {name: draw(panels) for name, panels in found.items() if panels}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, text in curves().items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
        print(f"docs/curves/{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
