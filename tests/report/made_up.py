"""Runs that never ran: their data, and the folders that they would have left."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megarl.config.algorithms import ALGORITHMS
from megarl.config.defaults import defaults
from megarl.report.data import RunData

NAMES = (
    *("eval/score", "eval/score_se", "eval/optimality", "eval/score@temperature=0.7", "eval/pass@4"),
    *("rollout/score", "rollout/score_std", "rollout/kl", "rollout/entropy", "rollout/response_tokens", "rollout/cut"),
    *("policy/loss", "policy/clip_fraction", "policy/approx_kl", "value/loss", "value/explained_variance"),
    *("train/loss", "train/grad_norm", "train/lr", "perf/step_seconds", "perf/peak_memory_gb", "rollout/logprob_drift"),
)
SUMMARY = {
    "status": "finished",
    "algorithm": "ppo",
    "steps": 20,
    "max_steps": 20,
    "seconds": {"generate": {"wall_s": 30.0, "cpu_s": 20.0}, "train": {"wall_s": 60.0, "cpu_s": 50.0}},
    "wall_s": 100.0,
    "cpu_s": 80.0,
    "peak_memory_gb": 1.5,
    "world_size": 4,
    "updated": "2026-01-01T00:00:00+0000",
}


def settings(algorithm: str = "ppo", **changed: Any) -> dict[str, Any]:
    """The defaults of an algorithm, with values by dotted key (a double underscore for the dot)."""
    plain = json.loads(json.dumps(defaults(ALGORITHMS[algorithm])))
    for key, value in changed.items():
        holder = plain
        *sections, name = key.split("__")
        for section in sections:
            holder = holder[section]
        holder[name] = value
    return plain


def rows(phases: int, names: Sequence[str] = NAMES, shift: float = 0.0) -> list[dict[str, float]]:
    """Values that differ from phase to phase and from metric to metric."""
    return [
        {"step": float(phase), **{name: math.sin(phase / 9 + index) + shift for index, name in enumerate(names)}}
        for phase in range(1, phases + 1)
    ]


def made_up(phases: int = 20, path: Path = Path("runs/made-up"), **changed: Any) -> RunData:
    """A run with everything that a report shows."""
    given: dict[str, Any] = {
        "path": path,
        "config": settings(optim__lr=0.5),
        "rows": rows(phases),
        "summary": SUMMARY,
        "samples": [
            {"phase": phase, "prompt": prompt, "response": f"{prompt} in {phase}", "score": phase / 10}
            for phase in (0, 10, 20)
            for prompt in ("one", "two")
        ],
        "entry": "ppo",
        "versions": {
            "megarl": "0.1.0",
            "torch": "2.8.0",
            "megatron-core": "0.19.2",
            "cpu": {"name": "a CPU", "count": 2},
            "memory_gb": 25.3,
        },
        "git": {"commit": "0123456789abcdef", "dirty": True},
    }
    return RunData(**{**given, **changed})


def trace(
    old: Sequence[float | None] = (-1.0, -2.0),
    new: Sequence[float | None] = (-0.5, -4.0),
    ref: Sequence[float | None] = (),
    count: int = 1,
    **changed: Any,
) -> dict[str, Any]:
    """A response of two tokens (`count` times) with the log-probs before and after a phase, and of the reference."""
    columns = {"old_logprobs": old, "new_logprobs": new, "ref_logprobs": ref}
    return {
        "prompt": "count",
        "score": 0.5,
        "length": 2 * count,
        "tokens": ["one ", "two"] * count,
        **{name: [*values] * count for name, values in columns.items() if values},
        **changed,
    }


def write_run(folder: Path, run: RunData) -> Path:
    """Write the files of a run into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        names = ["step", *run.metrics()]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(
            [int(row["step"]), *(repr(row[name]) if name in row else "" for name in names[1:])] for row in run.rows
        )
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(run.config)))
    (folder / "versions.json").write_text(json.dumps(run.versions))
    (folder / "git.json").write_text(json.dumps(run.git))
    for name, records in (("samples.jsonl", run.samples), ("tokens.jsonl", run.traces)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in records))
    if run.summary:
        (folder / "summary.json").write_text(json.dumps(run.summary))
    return folder


def write_scores(folder: Path, phases: Mapping[int, Sequence[float]]) -> None:
    """Write the scores of the responses of phases, as the journal of a run has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for phase, scores in phases.items():
        lines = [
            json.dumps({"of": f"{index}-0-a", "score": score, "parts": {}, "by": "b"})
            for index, score in enumerate(scores)
        ]
        (folder / f"reward-train-{phase:06d}.jsonl").write_text("".join(f"{line}\n" for line in lines))
