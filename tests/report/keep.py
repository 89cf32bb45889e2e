"""Keeps the metrics of a real run as a small fixture: `python -m tests.report.keep NAME COMMAND [FINDING...]`.

The command, such as 'megarl ppo +conf=demo seed=2', is run, in the folder of the repository. Only the columns that
findings read are kept, with four significant digits, beside the command and the settings that findings read. The
findings are those that the run must have; a run without any is a good one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.report.data import RunData, read_run

RUNS = Path(__file__).parent / "real"
ROOT = Path(__file__).parents[2]
SMALL = (
    "trainer.progress=none",
    "logger.tensorboard=false",
    "checkpoint.every=null",
    "checkpoint.save_last=false",
    "checkpoint.best.keep=0",
)  # what no number depends on
COLUMNS = (
    "rollout/score", "rollout/score_std", "rollout/score_before_replacing", "rollout/replaced", "rollout/prompts",
    "rollout/response_tokens", "rollout/kl", "rollout/entropy", "rollout/cut", "rollout/logprob_drift",
    "rollout/zero_spread_groups", "rollout/dropped", "rollout/failed_calls", "policy/approx_kl_max",
    "policy/clip_fraction", "value/clip_fraction", "value/explained_variance", "value/loss", "train/optimizer_steps",
    "train/loss", "train/accuracy", "train/grad_norm", "train/critic_grad_norm", "train/lr",
)  # fmt: skip
SETTINGS = (
    "trainer.max_phases", "trainer.max_steps", "trainer.precision", "optim.clip_grad", "ppo.rollouts", "ppo.objective",
    "ppo.ratio", "rollout.n", "rollout.max_new_tokens", "critic.kind", "checkpoint.best.metric", "checkpoint.best.mode",
    "rft.prompts",
)  # fmt: skip


def make(command: str, folder: Path) -> str:
    """Make a run in a folder. Return what it wrote to the terminal. Of commands that are joined by `&&`, the last makes
    the run; CLONE is a folder that they share."""
    *first, last = command.replace("CLONE", f"{folder}-clone").split(" && ")
    for before, one in enumerate(first):
        _run(one, Path(f"{folder}-{before}"))
    return _run(last, folder)


def _run(command: str, folder: Path) -> str:
    program, *words = shlex.split(command)
    if program == "megarl":
        words = ["-m", "megarl", *words]
    done = subprocess.run(
        [sys.executable, *words, *SMALL, f"run.dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (folder / "summary.json").exists(), f"{command} exited with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def keep(run: Path, name: str, command: str, findings: Sequence[str]) -> None:
    """Keep a finished run under a name."""
    data = read_run(run)
    there = [column for column in data.metrics() if column in COLUMNS or column.startswith("eval/")]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["step", *there])
    for row in data.rows:
        writer.writerow([int(row["step"]), *(f"{row[one]:.4g}" if one in row else "" for one in there)])
    (RUNS / f"{name}.csv").write_text(table.getvalue(), encoding="utf-8")
    index = read_index()
    config: dict[str, Any] = {}
    for key in SETTINGS:
        if (value := data.setting(key)) is not None:
            *parents, last = key.split(".")
            node = config
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
    summary = {key: data.summary[key] for key in ("rows", "seconds") if key in data.summary}
    index[name] = {"command": command, "findings": list(findings), "config": config, "summary": summary}
    lines = ",\n".join(f" {json.dumps(one)}: {json.dumps(index[one])}" for one in sorted(index))
    (RUNS / "runs.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_index() -> dict[str, Any]:
    path = RUNS / "runs.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def kept(name: str) -> RunData:
    """Return the data of a kept run."""
    told = read_index()[name]
    with (RUNS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = [{column: float(value) for column, value in row.items() if value} for row in csv.DictReader(file)]
    return RunData(RUNS / name, told["config"], rows, told["summary"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "run"
        make(sys.argv[2], made)
        keep(made, sys.argv[1], sys.argv[2], sys.argv[3:])
