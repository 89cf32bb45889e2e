"""`megarl compare ALGORITHM A B KEY=VALUE ...`: two configurations, or two revisions of the code, on the same seeds."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.command import INTERRUPTED, printable, run_command, say
from megarl.config.algorithms import ALGORITHMS
from megarl.config.arguments import check_arguments
from megarl.config.compare import CompareConfig
from megarl.config.own_keys import help_lines, read_own_keys, written
from megarl.disk import UnreadableError, local, read_json, writable, write_atomically
from megarl.errors import ConfigError, DataError, one_line
from megarl.report.shell import COMPARE
from megarl.report.write import refuse_foreign, write_page
from megarl.trials.jobs import Backend, Job, LocalJobs, Running
from megarl.trials.paired import Difference, paired_difference
from megarl.trials.plan import no_algorithm
from megarl.trials.results import last_error, metric_of, metrics_of, table
from megarl.trials.sides import Side, checked_out, read_side

USAGE = "megarl compare ALGORITHM A B KEY=VALUE ... compare.metric=NAME [compare.seeds=3] [--fail]"
DIFFERENT = 1
"""The exit code if the two differ and `--fail` is given."""
PAGE = "differences.html"
"""Name of the page in the folder of a comparison."""
_POLL_S = 0.2


@dataclass
class Comparison:
    """What a command line compares.

    Attributes:
        algorithm: what both train by.
        sides: A and B.
        settings: words of every run's command line.
        config: over which seeds, and how.
    """

    algorithm: str
    sides: list[Side]
    settings: list[str]
    config: CompareConfig

    @property
    def seeds(self) -> range:
        """The seeds of both."""
        return range(self.config.first_seed, self.config.first_seed + self.config.seeds)


def read(argv: Sequence[str]) -> Comparison:
    """Return the comparison that a command line describes."""
    words = ["compare.fail=true" if word == "--fail" else word for word in argv]
    if not words or words[0] not in ALGORITHMS:
        raise no_algorithm(words[0] if words else "", "compare", USAGE)
    algorithm, words = words[0], words[1:]
    own = [word.removeprefix("compare.") for word in words if word.startswith("compare.")]
    others = [word for word in words if not word.startswith("compare.")]
    if len(others) < 2:
        raise ConfigError(f"compare needs two sides, A and B: usage: {USAGE}", key="compare", value=others)
    tree = ALGORITHMS[algorithm].config
    config = read_own_keys(CompareConfig, own, "compare")
    if config.metric is None:
        raise ConfigError(
            "compare.metric is not set: name the metric that decides, as in compare.metric=eval/loss",
            key="compare.metric",
        )
    settings = others[2:]
    sides = [read_side(word) for word in others[:2]]
    for given in (settings, *(side.words for side in sides)):
        check_arguments(given, tree)
        for word in given:
            if (key := word.lstrip("+").partition("=")[0]) in ("seed", "run.dir", "run.name"):
                instead = "compare.first_seed and compare.seeds" if key == "seed" else "compare.dir"
                raise ConfigError(f"{key} is set by the comparison for every run: set {instead} instead", key=key)
    return Comparison(algorithm, sides, settings, config)


class Runs:
    """The runs of a comparison: each side with each seed."""

    def __init__(self, comparison: Comparison, folder: Path, backend: Backend) -> None:
        self.comparison, self.folder, self.backend = comparison, folder, backend

    def run(self) -> list[list[Path]]:
        """Run what is missing. Return the run folders by side and seed."""
        # Seed by seed, so that both sides of the first seeds are there early.
        waiting = [(side, seed) for seed in self.comparison.seeds for side in (0, 1)]
        running: dict[tuple[int, int], Running] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.comparison.config.at_once:
                    one = waiting.pop(0)
                    if not self._is_done(*one):
                        running[one] = self._start(*one)
                for one, job in list(running.items()):
                    if (code := job.poll()) is not None:
                        del running[one]
                        self._finish(*one, code)
                if running:
                    time.sleep(_POLL_S)
        except BaseException:
            for job in running.values():
                job.stop()
            while any(job.poll() is None for job in running.values()):  # they save, with the code that is checked out
                time.sleep(_POLL_S)
            raise
        return [[self.place(side, seed) / "run" for seed in self.comparison.seeds] for side in (0, 1)]

    def place(self, side: int, seed: int) -> Path:
        """Return the folder of a run, which is named by what decides its numbers."""
        one = self.comparison.sides[side]
        said = [self.comparison.algorithm, one.revision, self.comparison.settings, one.words]
        name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        return self.folder / f"{'ab'[side]}-{name}" / f"seed-{seed}"

    def _is_done(self, side: int, seed: int) -> bool:
        try:
            return bool(read_json(self.place(side, seed) / "done.json"))
        except UnreadableError:
            return False

    def _start(self, side: int, seed: int) -> Running:
        one, place = self.comparison.sides[side], self.place(side, seed)
        place.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-m", f"megarl.train_{self.comparison.algorithm}"]
        own = [f"seed={seed}", f"run.dir={written(str(place / 'run'))}"]
        command = [*program, *self.comparison.settings, *one.words, *own]
        return self.backend.start(Job(command, place / "log.txt", one.environment))

    def _finish(self, side: int, seed: int, code: int) -> None:
        place, name = self.place(side, seed), self.comparison.sides[side].name
        if code:
            why = last_error(place / "log.txt") or f"it ended with exit code {code}"
            raise DataError(f"{name} with seed {seed}: {why} ({place / 'log.txt'})", key=name, where=place / "log.txt")
        write_atomically(place / "done.json", json.dumps({"exit_code": code}) + "\n")
        say(f"{name} with seed {seed} is done")


def differences(comparison: Comparison, runs: Sequence[Sequence[Path]]) -> dict[str, Difference]:
    """Return the difference of the metric that decides, and of all others if asked, by name."""
    config, metric = comparison.config, comparison.config.metric
    assert metric is not None
    names = [metric]
    if config.all:
        logged = [set(metrics_of(run, config.value)) for side in runs for run in side]
        names += sorted(set.intersection(*logged) - {metric})
    found = {}
    for name in names:
        values = [[metric_of(run, name, config.value, "compare.metric") for run in side] for side in runs]
        if all(value is not None for side in values for value in side):
            a, b = ([float(value or 0) for value in side] for side in values)
            found[name] = paired_difference(a, b, interval=config.interval, confidence=config.confidence)
        elif name == metric:
            raise DataError(f"compare.metric={metric} is not finite in one of the runs", key="compare.metric")
    return found


def shown_differences(comparison: Comparison, found: dict[str, Difference]) -> str:
    """Return the table of differences, and a line that says what follows."""
    config = comparison.config
    rows = [
        [name, f"{one.a:.6g}", f"{one.b:.6g}", f"{one.mean:+.4g}", f"{one.low:+.4g}", f"{one.high:+.4g}", _verdict(one)]
        for name, one in found.items()
    ]
    text = table(["metric", "A", "B", "B - A", "from", "to", ""], rows)
    a, b = (side.name for side in comparison.sides)
    return f"A: {a}\nB: {b}\n{text}{_how(config)}\n"


def _how(config: CompareConfig) -> str:
    """Return how differences and intervals were computed."""
    kind = "Student's t" if config.interval == "t" else "bootstrap"
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "one seed, so there is no interval"
    return f"paired over {seeds}" + (f"; {config.confidence:.0%} interval: {kind}" if config.seeds > 1 else "")


def _draw(comparison: Comparison, found: dict[str, Difference], runs: Sequence[Sequence[Path]], path: Path) -> None:
    """Write the page of a comparison. Its numbers are printed and stored already, so that a page that cannot be made
    is a line and nothing else."""
    from megarl.report.differences import Measured, differences_page

    a, b = (side.name for side in comparison.sides)
    metrics = {
        name: Measured(
            one.values_a,
            one.values_b,
            one.mean,
            (one.low, one.high) if comparison.config.seeds > 1 else None,
            _verdict(one),
        )
        for name, one in found.items()
    }
    try:
        write_page(
            differences_page((a, b), comparison.seeds, metrics, _how(comparison.config), runs), path, "page", COMPARE
        )
    except Exception as problem:
        say(f"{path} is not written: {one_line(problem)}")
    else:
        say(f"page: {path}")


def _verdict(one: Difference) -> str:
    return "equal" if one.equal else "differs" if one.differs else "no difference found"


def compare(argv: Sequence[str], backend: Backend | None = None) -> int:
    """Compare and return the exit code."""
    comparison = read(argv)
    config = comparison.config
    place = config.dir or f"runs/compare-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = writable(str(local(place).absolute()), "compare.dir")
    refuse_foreign(folder / PAGE, "compare.dir", COMPARE)
    if all(side.revision is None for side in comparison.sides):
        from megarl.config.compose import compose

        for side in comparison.sides:
            compose(comparison.algorithm, [*comparison.settings, *side.words])
    with checked_out(comparison.sides) as sides:
        comparison.sides = sides
        runs = Runs(comparison, folder, backend or LocalJobs(config.at_once, cpus=config.cpus)).run()
    found = differences(comparison, runs)
    sys.stdout.write(printable(shown_differences(comparison, found)))
    content: dict[str, Any] = {name: {**vars(one), "differs": one.differs} for name, one in found.items()}
    write_atomically(folder / "differences.json", json.dumps(content, indent=2) + "\n")
    _draw(comparison, found, runs, folder / PAGE)
    say(f"runs: {folder}")
    return DIFFERENT if config.fail and found[str(config.metric)].differs else 0


def help_text() -> str:
    """Return the help text, with every key of the comparison."""
    lines = [
        f"usage: {USAGE}",
        "",
        "A and B are settings in quotes ('optim.lr=1e-3 optim.eps=1e-6'), YAML files, presets, or git revisions; . is",
        "the code as it is. docs/sweeps.md has more.",
        "",
        *help_lines(CompareConfig, "compare"),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Entry point of `python -m megarl.compare`."""
    argv = sys.argv[1:]

    def work() -> int:
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(help_text())
            return 0
        try:
            return compare(argv)
        except KeyboardInterrupt:
            say("interrupted; with compare.dir, finished runs are kept")
            return INTERRUPTED

    run_command(work, lambda: "debug=true" in argv)


if __name__ == "__main__":
    main()
