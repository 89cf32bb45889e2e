"""Keeps the metrics of a real run as a small fixture: `python -m tests.report.keep RUN NAME [FINDING...]`.

Only the columns that findings read are kept, with four significant digits, beside the settings that they read. The
findings are those that the run must have; a run without any is a good one.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.report.data import RunData, read_run

RUNS = Path(__file__).parent / "real"
COLUMNS = (
    "rollout/score", "rollout/score_std", "rollout/score_before_replacing", "rollout/replaced", "rollout/prompts",
    "rollout/response_tokens", "rollout/kl", "rollout/entropy", "rollout/cut", "rollout/logprob_drift",
    "rollout/zero_spread_groups", "rollout/dropped", "rollout/failed_calls", "policy/approx_kl_max",
    "policy/clip_fraction", "value/clip_fraction", "value/explained_variance", "value/loss", "train/optimizer_steps",
    "train/loss", "train/accuracy", "train/grad_norm", "train/critic_grad_norm", "train/lr",
)  # fmt: skip
SETTINGS = (
    "trainer.max_phases", "trainer.max_steps", "trainer.precision", "ppo.rollouts", "ppo.objective", "ppo.ratio",
    "rollout.n", "rollout.max_new_tokens", "critic.kind", "checkpoint.best.metric", "checkpoint.best.mode",
    "rft.prompts",
)  # fmt: skip


def keep(run: Path, name: str, findings: Sequence[str]) -> None:
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
    summary = {key: data.summary[key] for key in ("rows",) if key in data.summary}
    index[name] = {"findings": list(findings), "config": config, "summary": summary}
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
    keep(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
