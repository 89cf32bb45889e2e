"""Runs every algorithm small, in several layouts, on this checkout and on another revision, and compares every number
that a run prints. Use it for refactorings, which must not change any number.

    python -m benchmarks.same_numbers HEAD~1
    python -m benchmarks.same_numbers main --runs ppo_separate,sft --layouts tp2,pp2

Losses, norms and all other columns of metrics.csv that are not times must agree to `--tolerance`, and the sampled
tokens must be equal. Columns that the other revision does not have are named.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ("model.num_layers=4", "model.hidden_size=48", "seed=3", "run.resume=never", "trainer.eval_every=2")
WALKS = (
    *SMALL,
    *("+conf=randomwalks", "clone.steps=20", "trainer.max_phases=3", "ppo.rollouts=48"),
    *("trainer.global_batch_size=24", "trainer.micro_batch_size=6", "rollout.dump={out}/rollouts"),
)
SFT = (
    *SMALL,
    "trainer.max_steps=4",
    "trainer.global_batch_size=16",
    "trainer.micro_batch_size=4",
    "data.seq_length=64",
)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", SFT),
    "sft_packed": ("sft", (*SFT, "data.pack=true", "model.num_layers_unfrozen=2")),
    "ppo_shared": ("ppo", (*WALKS, "ppo.kl_coef=0.05", "critic.kind=shared")),
    "ppo_separate": ("ppo", (*WALKS, "ppo.kl_coef=0.05", "ppo.kl_in=loss", "critic.kind=separate")),
    "ilql": (
        "ilql",
        (
            *(
                *SMALL,
                "+conf=randomwalks_ilql",
                "data.seq_length=12",
                "trainer.max_steps=4",
                "trainer.global_batch_size=24",
            ),
            "trainer.micro_batch_size=6",
        ),
    ),
    "rft": (
        "rft",
        (
            *(*SMALL, "+conf=randomwalks_rft", "clone.steps=20", "trainer.max_phases=2", "rollout.n=6"),
            *("trainer.global_batch_size=24", "trainer.micro_batch_size=6", "rollout.dump={out}/rollouts"),
        ),
    ),
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one": (),
    "tp2": ("trainer.devices=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp2": ("trainer.devices=2", "parallel.pp=2"),
    "dp2": ("trainer.devices=2",),
    "vpp2": ("trainer.devices=2", "parallel.pp=2", "parallel.vpp=2"),
}
UNLIKE = ("perf/", "time/", "memory/")  # columns that differ from run to run
ROUNDING = {"rollout/logprob_drift": 1e-6}  # columns that are nothing but rounding: how far they may differ


def run(checkout: Path, command: str, overrides: Sequence[str], out: Path) -> None:
    """Run a training command of a checkout; its own package is imported, by this interpreter."""
    environ = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    settings = [override.format(out=out) for override in overrides]
    done = subprocess.run(
        [sys.executable, "-m", f"megarl.train_{command}", *settings, f"run.dir={out}/run"],
        cwd=checkout,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: train_{command} {' '.join(settings)} failed:\n{done.stderr[-2000:]}")


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "run" / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tokens(out: Path) -> list[tuple[object, ...]]:
    """The prompt, sample and response tokens of every rollout that was dumped, in order."""
    found = []
    for path in sorted((out / "rollouts").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "response" in record:
                found.append((path.name, record["prompt_id"], record["sample_id"], tuple(record["response"])))
    return found


def compare(ours: Path, theirs: Path, *, dumped: bool) -> tuple[float, str, str]:
    """The largest relative difference of a number, its column, and what else differs in words."""
    worst, where, problems = 0.0, "", []
    left, right = metrics(ours), metrics(theirs)
    new = sorted({*left[0]} - {*right[0]}) if left and right else []
    if len(left) != len(right) or not left:
        problems.append(f"{len(left)} rows of metrics.csv instead of {len(right)}")
    for step, (one, other) in enumerate(zip(left, right, strict=False)):
        for name in sorted(one.keys() | other.keys()):
            if name.startswith(UNLIKE) or name in new:
                continue
            a, b = one.get(name) or "", other.get(name) or ""
            if bool(a) != bool(b):
                problems.append(f"{name} of row {step} is {a or 'empty'} instead of {b or 'empty'}")
            elif a:
                difference = abs(float(a) - float(b)) / max(abs(float(b)), 1e-3)
                if abs(float(a) - float(b)) <= ROUNDING.get(name, 0.0):
                    continue
                if math.isnan(difference):
                    problems.append(f"{name} of row {step} is {a} instead of {b}")
                elif difference > worst:
                    worst, where = difference, f"{name} of row {step}"
    if dumped and not tokens(theirs):
        problems.append("no rollout was dumped")
    if tokens(ours) != tokens(theirs):
        problems.append("other tokens were sampled")
    return worst, f"{where} {'new: ' if new else ''}{' '.join(new)}", "; ".join(problems[:3])


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A temporary work tree of a revision."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--tolerance", type=float, default=1e-5)
    options = parser.parse_args()
    wrong = 0
    with checked_out(options.revision) as tree, tempfile.TemporaryDirectory() as folder:
        for name in options.runs.split(","):
            for layout in options.layouts.split(","):
                command, overrides = RUNS[name]
                ours, theirs = (Path(folder) / f"{name}-{layout}-{side}" for side in ("ours", "theirs"))
                for checkout, out in ((ROOT, ours), (tree, theirs)):
                    run(checkout, command, (*overrides, *LAYOUTS[layout]), out)
                dumped = any(override.startswith("rollout.dump=") for override in overrides)
                worst, where, problems = compare(ours, theirs, dumped=dumped)
                bad = bool(problems) or worst > options.tolerance
                wrong += bad
                verdict = "DIFFERENT" if bad else "same"
                print(f"{name:14} {layout:4} {verdict:9} {worst:.1e} {where} {problems}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
