"""What benchmarks that time a model of transformers and one of ours in turn have in common."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generate import Side
from benchmarks.train_step import describe, live_grid, markdown
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.source import Source
from megarl.models.roles import Role
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world


def loaded(model: Any, grid: Grid) -> tuple[Engine, Source]:
    """Return an engine with the weights of a model of transformers, and what it was read from."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source = open_source(Path(folder))
        role = Role("policy", source.model, source.vocab_size, source=source, optim=OptimConfig())
        return build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1), source


def require_equal_losses(ours: float, theirs: float) -> None:
    """End the program if the two sides do not compute the same."""
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        sys.exit(f"the losses differ: {ours} here, {theirs} in transformers")


def step_of(compute: Callable[[], float]) -> Side:
    """Return the side that computes a training step."""
    return Side(lambda: [[int(compute())]], [], [])


def timed(sides: tuple[Side, Side], seconds: float) -> tuple[list[float], list[float]]:
    """Run both sides in turn, three times at least, and return their median wall and CPU seconds."""
    stop = time.monotonic() + seconds
    while len(sides[0].wall) < 3 or time.monotonic() < stop:
        for side in sides:
            side.run()
    wall, cpu = ([statistics.median(getattr(side, kind)) for side in sides] for kind in ("wall", "cpu"))
    return wall, cpu


def print_table(
    about: str | None,
    header: list[str],
    cases: dict[str, Any],
    default: list[str],
    compare: Callable[[Any, Grid, float], list[list[str]]],
    argv: Sequence[str] | None,
) -> int:
    """Run a benchmark's command line: print the lines of the cases that it names. Returns the exit code."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--cases", nargs="*", default=default, choices=cases)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line")
    arguments = parser.parse_args(argv)
    device = start_world()
    lines: list[list[str]] = []
    for name in arguments.cases:
        with live_grid(device) as grid:
            lines += compare(cases[name], grid, arguments.seconds)
    print(describe(device))
    print(markdown(header, lines))
    return 0
