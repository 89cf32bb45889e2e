"""A run that saves every step, killed again and again at any moment, comes to the unbroken run's end, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import megarl
from megarl.checkpoint import find, step_of, verify
from tests.e2e.runs import OFFLINE_WALKS, PAIRS, SMALL, assert_same_bits, final_tensors

KILLS = int(os.environ.get("MEGARL_GATE_KILLS", "50"))  # of SFT; the other algorithms have a share of them
PATIENCE_S = 300.0
STEPS_PER_KILL = 6

SAVING = ["logger.csv=false", "optim.schedule=constant", "checkpoint.keep_last=2", "trainer.eval_every=null"]
TINY = ["model.num_layers=2", "model.hidden_size=32"]
RUNS = {
    "sft": [*SMALL, *TINY, "data.seq_length=32"],
    "ilql": [*OFFLINE_WALKS, *TINY],
    "dpo": [*PAIRS, "data.train=[pairs.jsonl]", "dpo.cache=cache"],
    "rm": [*PAIRS, "data.train=[pairs.jsonl]"],
}


class Storm:
    """One run, started again after each kill. Draws from a seeded generator when to kill next."""

    def __init__(self, entry: str, run_dir: Path, processes: int, steps: int, seed: int) -> None:
        self.entry, self.run_dir, self.folder = entry, run_dir, run_dir / "checkpoints"
        own = [f"run.dir={run_dir}", f"trainer.devices={processes}", f"trainer.max_steps={steps}"]
        self.command = [*RUNS[entry], *SAVING, *own]
        self.draw = random.Random(seed)
        self.start_seconds = 0.0  # how long the last process took to its first checkpoint

    def kill_once(self) -> str:
        """Start, wait for a moment of some kind, kill -9 every process of the run, look at what is left."""
        newest = self.newest()
        moment = self.draw.choice(["in a step", "in a step", "in a save", "in a save", "while starting"])
        background = self.draw.random() < 0.5
        process = self.start("checkpoint.every=1", f"checkpoint.async_save={str(background).lower()}")
        began = time.monotonic()
        try:
            if moment == "while starting" and self.start_seconds:
                time.sleep(self.draw.uniform(0.0, self.start_seconds))
            else:
                goal = newest + self.draw.randint(1, STEPS_PER_KILL)
                self.wait(process, lambda: self.newest() > newest)
                self.start_seconds = time.monotonic() - began
                self.wait(process, lambda: self.newest() >= goal)
                if moment == "in a save":
                    self.wait(process, lambda: any(self.folder.glob(".step-*.writing")))
                    time.sleep(self.draw.uniform(0.0, 0.02))
                else:
                    time.sleep(self.draw.uniform(0.0, 0.3))
        finally:
            assert process.poll() is None, f"the run ended before it was killed: {self.console()}"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.look(newest)
        return f"{moment}{', in the background' if background else ''}, after step {self.newest()}"

    def look(self, newest: int) -> None:
        """Whatever has a checkpoint's name is one, and nothing that was committed is lost."""
        for path in find(self.folder):
            assert verify(path) is None, f"{path}: {verify(path)}"
        assert self.newest() >= newest

    def finish(self) -> None:
        process = self.start("checkpoint.every=50")
        assert process.wait(timeout=1800) == 0, self.console()
        if self.newest_at_start:
            assert f"({self.newest_at_start} optimizer steps," in self.console()

    def start(self, *overrides: str) -> "subprocess.Popen[bytes]":
        self.newest_at_start = self.newest()
        self.run_dir.mkdir(exist_ok=True)
        with (self.run_dir / "console.txt").open("wb") as console:
            return subprocess.Popen(
                [sys.executable, "-m", f"megarl.train_{self.entry}", *self.command, *overrides],
                cwd=self.run_dir.parent,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(megarl.__file__).parents[1])},
                start_new_session=True,  # a group of its own, which the processes that it starts belong to
            )

    def wait(self, process: "subprocess.Popen[bytes]", met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not met():
            assert process.poll() is None, f"the run ended by itself: {self.console()}"
            assert time.monotonic() < deadline, f"nothing happened for {PATIENCE_S:.0f} s: {self.console()}"
            time.sleep(0.002)

    def newest(self) -> int:
        found = find(self.folder)
        return step_of(found[-1]) if found else 0

    def console(self) -> str:
        return (self.run_dir / "console.txt").read_text(errors="replace")[-4000:]


@pytest.mark.gate
@pytest.mark.parametrize(
    ("entry", "processes", "share"),
    [
        ("sft", 1, 0.8),
        ("sft", 2, 0.2),
        ("ilql", 1, 0.3),
        ("ilql", 2, 0.1),
        ("dpo", 1, 0.1),
        ("dpo", 2, 0.1),
        ("rm", 2, 0.1),
    ],
)
def test_a_run_killed_at_any_moment_ends_in_the_unbroken_runs_weights(
    entry: str, processes: int, share: float, tmp_path: Path
) -> None:
    kills = max(1, round(KILLS * share))
    steps = 60 + kills * 3 * STEPS_PER_KILL
    pairs = [
        {"prompt": "q" * (1 + n % 5), "chosen": "a" * (1 + n % 7), "rejected": "b" * (1 + n % 6)} for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    unbroken = Storm(entry, tmp_path / "unbroken", processes, steps, seed=0)
    unbroken.finish()
    broken = Storm(entry, tmp_path / "broken", processes, steps, seed=processes)
    for kill in range(kills):
        moment = broken.kill_once()
        print(f"kill {kill + 1} of {kills}: {moment}")  # noqa: T201 - pytest shows it when the test fails
    broken.finish()
    assert_same_bits(final_tensors(tmp_path / "broken"), final_tensors(tmp_path / "unbroken"))
    left = sorted(path.name for path in broken.folder.iterdir() if path.name.startswith("."))
    assert not left, "what kills left half done was not cleared away"
