"""`megarl sweep ALGORITHM KEY=VALUE ... sweep.KEY='loguniform(1e-5,1e-3)'`: many runs that search for good settings.

The folder of a sweep is its whole state: `sweep.json` (what is searched), and a folder per trial with `trial.json` and
the run. A sweep that is started again runs what is missing; a trial that was cut resumes as any run does.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.command import INTERRUPTED, printable, run_command, say
from megarl.config.own_keys import help_lines, written
from megarl.config.sweep import SweepConfig
from megarl.disk import write_atomically
from megarl.errors import ConfigError, MegarlError
from megarl.trials.folder import SweepFolder
from megarl.trials.jobs import Backend, Job, LocalJobs, RayJobs, Running
from megarl.trials.plan import USAGE, Plan, make_search, read
from megarl.trials.results import as_csv, last_error, metric_of, table
from megarl.trials.search import RandomSearch, Search, Step

_POLL_S, _PATIENCE_S = 0.2, 600.0


# --- the loop ---------------------------------------------------------------------------------------------------------


class Sweep:
    """Runs the trials of a sweep until its search has no more."""

    def __init__(self, folder: SweepFolder, search: Search, backend: Backend) -> None:
        self.folder, self.search, self.backend, self.plan = folder, search, backend, folder.plan
        self.running: dict[int, tuple[Step, Running, float]] = {}

    def run(self) -> int:
        """Run what is missing and return the exit code: 1 if every trial failed, that of Ctrl-C after one."""
        try:
            with _ended_by_sigterm():
                self._resume()
                while self._fill() or self.running:
                    if not self._collect():
                        time.sleep(_POLL_S)
        except KeyboardInterrupt:
            self._stop()
            say(f"interrupted; the same command continues with sweep.dir={self.folder.path}")
            return INTERRUPTED
        except BaseException:
            self._stop()
            raise
        return 0 if any(value is not None for one in self.folder.trials() for value in one.results.values()) else 1

    def _resume(self) -> None:
        """Queue the trials that were cut, once their processes have saved, and those that failed if asked."""
        if self.plan.config.retry_failed:
            self.folder.reopen_failed()
        self._cut = [
            Step(trial.number, trial.settings, trial.running)
            for trial in self.folder.trials()
            if trial.running is not None
        ]
        for step in self._cut:
            _wait_for(self.folder.records[step.number]["pid"])
        if self.folder.records:
            done = sum(bool(one["results"]) for one in self.folder.records)
            say(f"resuming {self.folder.path}: {done} trials have results, {len(self._cut)} were cut")

    def _fill(self) -> bool:
        """Start trials while there is space. Return whether one was started."""
        started = False
        while len(self.running) < self.plan.config.at_once:
            step = self._cut.pop(0) if self._cut else self.search.next(self.folder.trials())
            if step is None:
                break
            self._start(step)
            started = True
        return started

    def _start(self, step: Step) -> None:
        folder = self.folder.trial_folder(step.number)
        # The record is written first: a trial without one would be started twice.
        self.folder.write(step.number, settings=step.settings, running=step.budget)
        job = Job(command(self.plan, step, folder), folder / "log.txt", {})
        running = self.backend.start(job)
        self.running[step.number] = (step, running, time.monotonic())
        self.folder.write(step.number, pid=running.pid)

    def _collect(self) -> bool:
        """Take the results of the trials that have ended. Return whether there was one."""
        ended = [(number, code) for number, (_, job, _) in self.running.items() if (code := job.poll()) is not None]
        for number, code in ended:
            step, _, began = self.running.pop(number)
            self._finish(step, code, time.monotonic() - began)
        return bool(ended)

    def _finish(self, step: Step, code: int, seconds: float) -> None:
        folder = self.folder.trial_folder(step.number)
        none_yet = not any(one["results"] for one in self.folder.records)
        value, why = None, ""
        if code == 0:
            try:
                value = metric_of(folder / "run", self.plan.metric, self.plan.config.value)
                why = "" if value is not None else "is not finite"
            except MegarlError as error:
                if none_yet:  # so it will be in every trial
                    raise
                why = str(error)
        else:
            why = last_error(folder / "log.txt") or f"ended with exit code {code}"
            if code == MegarlError.exit_code and none_yet:
                self.folder.forget_last()
                log = folder / "log.txt"
                raise ConfigError(f"the first trial was refused: {why} ({log})", key="trial", where=log)
        self.folder.finish(
            step.number, step.budget, value, exit_code=code, seconds=round(seconds, 1), error=why or None
        )
        budget = f" {self.plan.budget_key}={step.budget}" if step.budget else ""
        said = f"{self.plan.metric}={value:.6g}" if value is not None else f"failed: {why}"
        say(f"trial {step.number}{budget} {_spelled(step.settings)}: {said}")

    def _stop(self) -> None:
        """Let the running trials save and end; a second Ctrl-C ends them at once."""
        jobs = [job for _, job, _ in self.running.values()]
        for job in jobs:
            job.stop()
        try:
            while any(job.poll() is None for job in jobs):
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            for job in jobs:
                job.stop(at_once=True)


def command(plan: Plan, step: Step, folder: Path) -> list[str]:
    """Return the command line of a trial."""
    launcher = plan.config.launcher
    program = [sys.executable, "-m", f"megarl.train_{plan.algorithm}"] if launcher is None else shlex.split(launcher)
    budget = [f"{plan.budget_key}={step.budget}"] if step.budget else []
    own = [f"{key}={value}" for key, value in step.settings.items()]
    return [*program, *plan.settings, *own, *budget, f"run.dir={written(str(folder / 'run'))}"]


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C within the block."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for(pid: int | None) -> None:
    """Wait until a process of this machine that trains for an earlier sweep has saved and ended."""
    end = time.monotonic() + _PATIENCE_S
    while pid is not None and _trains(pid) and time.monotonic() < end:
        time.sleep(_POLL_S)


def _trains(pid: int) -> bool:
    """Return whether a process id is that of a running megarl program, and not of another one with the same id."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and any("megarl" in word for word in process.cmdline())
    except psutil.Error:
        return False


# --- what it prints ---------------------------------------------------------------------------------------------------


def report(folder: SweepFolder) -> str:
    """Write `results.json` and `results.csv`, best trial first, and return the table."""
    plan, trials = folder.plan, folder.trials()
    search = RandomSearch(plan.spaces, 0, lower_is_better=plan.lower_is_better)
    budgets = {trial.number: max(trial.results, default=0) for trial in trials}
    order = search.ranked([(trial.results.get(budgets[trial.number]), trial.number) for trial in trials])
    order.sort(key=lambda number: -budgets[number])  # of a larger budget first, as those are the survivors
    rows: list[dict[str, Any]] = []
    for number in order:
        trial, record = trials[number], folder.records[number]
        result = record["results"].get(str(budgets[number]), {})
        status = "running" if not result else "finished" if result["value"] is not None else "failed"
        rows.append(
            {
                "trial": number,
                plan.metric: result.get("value"),
                **({plan.budget_key: budgets[number]} if plan.config.kind == "hyperband" else {}),
                **trial.settings,
                "status": status,
                "seconds": result.get("seconds"),
                "error": result.get("error"),
                "run": str(folder.trial_folder(number) / "run"),
            }
        )
    best = rows[0] if rows and rows[0]["status"] == "finished" else None
    found = {"metric": plan.metric, "lower_is_better": plan.lower_is_better, "best": best, "trials": rows}
    write_atomically(folder.path / "results.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_atomically(folder.path / "results.csv", as_csv(rows))
    header = [name for name in (rows[0] if rows else {}) if name not in ("error", "run")]
    text = table(header, [[_cell(row[name]) for name in header] for row in rows]) if rows else ""
    if best is not None:
        text += f"best: {_spelled(trials[best['trial']].settings)}\n"
    return text


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _spelled(settings: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def help_text() -> str:
    """Return the help text, with every key of the sweep."""
    lines = [
        f"usage: {USAGE}",
        "",
        "A key of the algorithm has a distribution: choice(a,b), uniform(0,1), loguniform(1e-5,1e-3), int(1,8) or",
        "logint(16,1024). Quote it, as shells read parentheses. docs/sweeps.md has more.",
        "",
        *help_lines(SweepConfig, "sweep"),
        "",
    ]
    return "\n".join(lines)


def sweep(argv: Sequence[str]) -> int:
    """Run a sweep and return the exit code."""
    plan = read(argv)
    backend: Backend = (
        RayJobs(cpus=plan.config.cpus, gpus=plan.config.gpus)
        if plan.config.backend == "ray"
        else LocalJobs(plan.config.at_once, cpus=plan.config.cpus, gpus=plan.config.gpus)
    )
    from megarl.config.compose import compose

    first = Step(0, {space.key: space.value(0.5) for space in plan.spaces})
    config, _ = compose(plan.algorithm, [*plan.settings, *(f"{key}={value}" for key, value in first.settings.items())])
    largest = config
    for part in plan.budget_key.split(".") if plan.config.kind == "hyperband" else ():
        largest = getattr(largest, part, 1)
    folder = SweepFolder(plan)
    with folder.opened():
        code = Sweep(folder, make_search(plan, largest if isinstance(largest, int) else 1), backend).run()
        sys.stdout.write(printable(report(folder)))
    say(f"results: {folder.path / 'results.json'} and results.csv")
    return code


def main() -> None:
    """Entry point of `python -m megarl.sweep`."""
    argv = sys.argv[1:]

    def work() -> int:
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(help_text())
            return 0
        os.environ.setdefault("PYTHONUNBUFFERED", "1")
        return sweep(argv)

    run_command(work, lambda: "debug=true" in argv)


if __name__ == "__main__":
    main()
