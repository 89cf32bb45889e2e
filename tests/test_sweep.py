"""`megarl sweep` with fast fake trials: state, resume, failures and tables; and once with runs."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.command import INTERRUPTED
from megarl.errors import ConfigError
from megarl.sweep import Sweep, report, sweep
from megarl.trials.folder import SweepFolder
from megarl.trials.jobs import Job
from megarl.trials.plan import make_search, read
from tests.e2e.runs import SMALL, run_entry
from tests.refusals import refused
from tests.worlds import Worlds

LR = "sweep.optim.lr=loguniform(1e-5,1e-1)"
Measure = Callable[[dict[str, str]], "float | int | None"]


def settings_of(job: Job) -> dict[str, str]:
    return dict(word.split("=", 1) for word in job.command if "=" in word)


def loss(settings: dict[str, str]) -> float:
    return (math.log10(float(settings["optim.lr"])) + 3) ** 2 + 1 / float(settings.get("trainer.max_steps", 1))


class FakeJobs:
    """Trials that measure a function of their settings at once. An integer is an exit code without a result."""

    def __init__(self, measure: Measure = loss, most: int = 1000) -> None:
        self.measure, self.most = measure, most
        self.started: list[dict[str, str]] = []

    def start(self, job: Job) -> "FakeJobs":
        if len(self.started) == self.most:
            raise KeyboardInterrupt  # as after Ctrl-C, while another trial starts
        self.started.append(settings_of(job))
        self.job = job
        return self

    pid = None
    code = 0

    def poll(self) -> int:
        settings = settings_of(self.job)
        found = self.measure(settings)
        if isinstance(found, int):
            self.job.log.write_text(f"error: exit {found}\n")
            return found
        run = Path(settings["run.dir"])
        run.mkdir(parents=True, exist_ok=True)
        metrics = {"eval/loss": {"last": found, "best": found, "last5": found}}
        (run / "summary.json").write_text(json.dumps({"metrics": metrics}))
        return 0

    def stop(self, *, at_once: bool = False) -> None:
        pass


def run(folder: Path, *words: str, jobs: FakeJobs | None = None) -> tuple[int, dict[str, Any], FakeJobs]:
    """Run a sweep with fake trials; return its exit code, results.json and the trials that were started."""
    jobs = jobs or FakeJobs()
    metric = () if any(word.startswith("sweep.metric=") for word in words) else ("sweep.metric=eval/loss",)
    plan = read(["sft", LR, *metric, f"sweep.dir={folder}", *words])
    state = SweepFolder(plan)
    with state.opened():
        code = Sweep(state, make_search(plan, 9), jobs).run()
        report(state)
    return code, json.loads((folder / "results.json").read_text()), jobs


def numbers(results: dict[str, Any]) -> dict[int, tuple[str, float]]:
    return {row["trial"]: (row["optim.lr"], row["eval/loss"]) for row in results["trials"]}


@pytest.mark.parametrize("kind", ["grid", "random", "bayesian", "hyperband"])
def test_a_sweep_that_is_cut_runs_only_what_is_missing(kind: str, tmp_path: Path) -> None:
    words = [f"sweep.kind={kind}", "sweep.trials=9", "sweep.grid_points=9"]
    _, whole, jobs = run(tmp_path / "whole", *words)
    code, _, before = run(tmp_path / "cut", *words, jobs=FakeJobs(most=4))
    assert code == INTERRUPTED
    code, resumed, after = run(tmp_path / "cut", *words)
    assert code == 0
    assert numbers(resumed) == numbers(whole)
    assert len(before.started) + len(after.started) == len(jobs.started)
    assert after.started[0]["run.dir"].endswith("trials/0004/run")  # the one that was cut goes on in its folder
    again = run(tmp_path / "cut", *words)[2]
    assert again.started == []


def test_the_best_trial_is_first_in_every_table(tmp_path: Path) -> None:
    _, results, _ = run(tmp_path, "sweep.trials=5")
    values = [row["eval/loss"] for row in results["trials"]]
    assert values == sorted(values)
    assert results["best"] == results["trials"][0]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["eval/loss"]) for row in rows] == values
    assert rows[0]["optim.lr"] == results["best"]["optim.lr"]


def test_hyperband_goes_on_in_the_same_run_folder(tmp_path: Path) -> None:
    _, results, jobs = run(tmp_path, "sweep.kind=hyperband", "sweep.trials=9")
    best = results["best"]
    steps = [one["trainer.max_steps"] for one in jobs.started if one["run.dir"] == best["run"]]
    assert steps == ["1", "3", "9"]
    assert best["trainer.max_steps"] == 9


def test_failed_trials_are_told_and_not_repeated_unless_asked(tmp_path: Path) -> None:
    calls = iter(range(100))
    broken = FakeJobs(lambda settings: 1 if next(calls) == 1 else loss(settings))
    code, results, _ = run(tmp_path, "sweep.trials=4", jobs=broken)
    assert code == 0
    failed = results["trials"][-1]
    assert (failed["status"], failed["error"], failed["trial"]) == ("failed", "exit 1", 1)
    assert run(tmp_path, "sweep.trials=4")[2].started == []
    code, results, again = run(tmp_path, "sweep.trials=4", "sweep.retry_failed=true")
    assert [one["run.dir"] for one in again.started] == [failed["run"]]
    assert {row["status"] for row in results["trials"]} == {"finished"}


def test_a_sweep_whose_first_trial_is_refused_ends_and_may_be_corrected(tmp_path: Path) -> None:
    with refused(ConfigError, key="trial", names=("exit 2",)):
        run(tmp_path, "sweep.trials=4", jobs=FakeJobs(lambda settings: 2))
    code, results, _ = run(tmp_path, "sweep.trials=4", "model.num_layers=2")
    assert (code, len(results["trials"])) == (0, 4)


def test_a_metric_that_no_run_has_ends_the_sweep_with_the_nearest(tmp_path: Path) -> None:
    with refused(ConfigError, key="sweep.metric", offers={"sweep.metric": ["eval/loss"]}):
        run(tmp_path, "sweep.trials=4", "sweep.metric=eval/los")
    assert run(tmp_path, "sweep.trials=4")[0] == 0


def test_a_sweep_without_a_result_has_exit_code_1(tmp_path: Path) -> None:
    assert run(tmp_path, "sweep.trials=2", jobs=FakeJobs(lambda settings: 3))[0] == 1


def test_another_sweep_in_the_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, "sweep.trials=2")
    with refused(ConfigError, key="sweep.optim.eps"):
        run(tmp_path, "sweep.optim.eps=choice(1e-8,1e-6)")
    with refused(ConfigError, key="settings"):
        run(tmp_path, "model.num_layers=2")
    assert len(run(tmp_path, "sweep.trials=3")[1]["trials"]) == 3  # more trials are no other sweep


def test_a_folder_has_one_sweep_at_a_time(tmp_path: Path) -> None:
    plan = read(["sft", LR, "sweep.metric=eval/loss", f"sweep.dir={tmp_path}"])
    with SweepFolder(plan).opened(), refused(ConfigError, key="sweep.dir"), SweepFolder(plan).opened():
        pass


FAKE_RUN = """
import json, sys, time
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(settings["run.dir"]); run.mkdir(parents=True, exist_ok=True)
tries = run / "tries"; tries.write_text((tries.read_text() if tries.exists() else "") + "x")
if run.parent.name >= "0002" and not Path(settings["model.path"]).exists(): time.sleep(600)
value = {"last": float(settings["optim.lr"])}
(run / "summary.json").write_text(json.dumps({"metrics": {"eval/loss": value}}))
"""


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE_RUN)
    words = [
        *("sft", f"sweep.dir={tmp_path}/sweep", "sweep.metric=eval/loss", LR, "sweep.trials=4", "sweep.at_once=2"),
        *(f"model.path={tmp_path}/go", f"sweep.launcher={sys.executable} {tmp_path}/fake.py"),
    ]
    command = [sys.executable, "-m", "megarl", "sweep", *words]
    trials = tmp_path / "sweep" / "trials"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not all((trials / name / "run" / "tries").exists() for name in ("0002", "0003")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "go").write_text("")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    tries = [(trials / f"{number:04d}" / "run" / "tries").read_text() for number in range(4)]
    assert tries == ["x", "x", "xx", "xx"]
    assert "2 were cut" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("best: optim.lr=")


class WorldJobs(FakeJobs):
    """Trials that run in a world of the tests, one after the other."""

    def __init__(self, worlds: Worlds) -> None:
        super().__init__()
        self.worlds = worlds

    def poll(self) -> int:
        words = list(self.job.command[3:])
        self.worlds.run(1, run_entry, self.job.command[2].removeprefix("megarl.train_"), words)
        return 0


def test_hyperband_over_runs_resumes_them(worlds: Worlds, tmp_path: Path) -> None:
    small = [*SMALL, "model.num_layers=1", "model.hidden_size=32", "optim.schedule=constant", "sweep.at_once=1"]
    words = ["sweep.kind=hyperband", "sweep.trials=2", "sweep.eta=2", "sweep.min_budget=2", "sweep.max_budget=4"]
    code, results, jobs = run(tmp_path, *small, *words, "sweep.metric=train/loss", jobs=WorldJobs(worlds))
    assert code == 0
    assert [one["trainer.max_steps"] for one in jobs.started] == ["2", "2", "4"]
    best = results["best"]
    with Path(best["run"], "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert steps == [1, 2, 3, 4]  # no step was repeated


def test_a_setting_that_no_run_takes_is_refused_before_the_first_trial(tmp_path: Path) -> None:
    with refused(ConfigError, key="optim.lr"):
        sweep(["sft", "sweep.optim.lr=choice(fast,slow)", "sweep.metric=eval/loss", f"sweep.dir={tmp_path}/new"])
    assert not (tmp_path / "new").exists()
