"""Pairs of real runs started in one folder: one trains, the other is refused, and every file is the first one's."""

import csv
import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from megarl import training
from megarl.checkpoint import find, verify
from megarl.config.compose import run
from tests.e2e.runs import SMALL

PAIRS = int(os.environ.get("MEGARL_GATE_PAIRS", "50"))
PATIENCE_S = 300.0
ENDLESS = ["trainer.max_steps=1000000", "checkpoint.every=2", "checkpoint.keep_last=1000", "optim.schedule=constant"]
TINY = [*SMALL, "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "data.seq_length=32", "data.eval=[]"]
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


class Run:
    """A command that trains in a folder until it is stopped."""

    def __init__(self, run_dir: Path, lr: float, *overrides: str, launcher: list[str] = PYTHON) -> None:
        self.lr = lr
        settings = [*TINY, *ENDLESS, f"run.dir={run_dir}", f"optim.lr={lr}", *overrides]
        self.process = subprocess.Popen(
            [*launcher, "megarl.train_sft", *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Exit code and stderr, after a signal."""
        if number is not None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said


def wait(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_one_runs_files(run_dir: Path, lr: float) -> None:
    assert not list(run_dir.glob("config.*.yaml")), "nothing was put aside"
    assert OmegaConf.load(run_dir / "config.yaml").optim.lr == lr
    with (run_dir / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, len(steps) + 1))
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["rank-0000.log"]
    assert len((run_dir / "logs" / "rank-0000.log").read_text().split("run folder:")) == 2
    assert not list((run_dir / "checkpoints").glob("earlier-*"))
    for path in find(run_dir / "checkpoints"):
        assert verify(path) is None


def train(run_dir: Path, lr: float, delay_s: float, console: Path) -> None:
    """The command in a process that has imported everything, so that two come to the folder at the same moment."""
    time.sleep(delay_s)
    os.dup2(os.open(console, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    run("sft", [*TINY, *ENDLESS, f"run.dir={run_dir}", f"optim.lr={lr}"], partial(training.train, "sft"))


@pytest.mark.gate
def test_of_two_runs_started_within_a_second_one_trains(tmp_path: Path) -> None:
    importlib.import_module("megarl.run.runner")
    importlib.import_module("megarl.modules.sft")
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    for pair in range(PAIRS):
        run_dir = tmp_path / str(pair)
        delays = (0.0, 0.0 if pair % 2 else draw.uniform(0.0, 1.0))
        consoles = [tmp_path / f"{pair}-{number}" for number in range(2)]
        runs = [
            context.Process(target=train, args=(run_dir, number + 1.0, delay, console))
            for number, (delay, console) in enumerate(zip(delays, consoles, strict=True))
        ]
        for process in runs:
            process.start()
        wait(lambda runs=runs: any(not process.is_alive() for process in runs))
        wait(lambda run_dir=run_dir: len(find(run_dir / "checkpoints")) > 1)
        refused = 0 if runs[0].exitcode is not None else 1
        owner = runs[1 - refused]
        assert runs[refused].exitcode == 2
        said = consoles[refused].read_text()
        for name in ("error: ", f"run.dir={run_dir}", f"process {owner.pid}"):
            assert name in said
        assert len(said.splitlines()) == 1
        assert owner.pid is not None
        os.kill(owner.pid, signal.SIGTERM)
        owner.join()
        assert owner.exitcode == 0, consoles[1 - refused].read_text()
        assert_one_runs_files(run_dir, 2.0 - refused)


@pytest.mark.gate
@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["trainer.devices", "torchrun"])
def test_all_processes_of_a_refused_run_end_with_one_line(launcher: list[str], tmp_path: Path) -> None:
    owner = Run(tmp_path, 1e-3)
    wait(lambda: len(find(tmp_path / "checkpoints")) > 0)
    refused = Run(tmp_path, 2e-3, *(["trainer.devices=2"] if launcher == PYTHON else []), launcher=launcher)
    code, said = refused.end()
    assert code == (2 if launcher == PYTHON else 1), "torchrun passes no exit code on"
    assert said.count(f"error: run.dir={tmp_path} ") == 1
    assert "exitcode  : 2" in said or launcher == PYTHON
    assert owner.end(signal.SIGTERM)[0] == 0
    assert_one_runs_files(tmp_path, owner.lr)


@pytest.mark.gate
def test_after_a_kill_the_next_start_goes_on_at_once(tmp_path: Path) -> None:
    killed = Run(tmp_path, 1e-3)
    wait(lambda: len(find(tmp_path / "checkpoints")) > 0)
    killed.end(signal.SIGKILL)
    log = tmp_path / "logs" / "rank-0000.log"
    after = Run(tmp_path, 1e-3)
    wait(lambda: "restoring from" in log.read_text() or after.ended())
    assert "waiting" not in after.end(signal.SIGTERM)[1]


PPO = [
    *(
        "megarl.train_ppo",
        "+conf=randomwalks",
        "trainer.devices=2",
        "parallel.tp=2",
        "clone.steps=5",
        "ppo.rollouts=16",
    ),
    *("trainer.max_phases=1", "trainer.progress=none", "trainer.eval_every=null"),
]
SFT = ["megarl.train_sft", *SMALL, "trainer.max_steps=20"]


@pytest.mark.gate
@pytest.mark.parametrize("command", [PPO, [*SFT, "trainer.devices=2"], SFT], ids=["PPO", "SFT", "one process"])
def test_a_run_on_one_machine_listens_on_loopback_only(command: list[str], tmp_path: Path) -> None:
    """Also where the host's name stands for an address that others reach, if this process may change it."""
    line = [*PYTHON, *command, f"run.dir={tmp_path}"]
    outside = outside_address()
    if os.geteuid() == 0 and outside is not None:
        line = ["unshare", "--uts", "sh", "-c", f'hostname {outside} && exec "$@"', "sh", *line]
    started = psutil.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seen = set()
    while started.poll() is None:
        for process in descendants(started):
            try:
                connections = process.net_connections()
            except psutil.Error:
                continue
            seen |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
        time.sleep(0.02)
    assert started.returncode == 0
    assert seen == {"127.0.0.1"}


def descendants(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def outside_address() -> str | None:
    import socket

    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)
