"""Long sweeps of the small tasks: which settings hold on many graphs and seeds. Each finished run is a line of a file,
so that a sweep can be interrupted, continued, and shared between machines.

    python -m benchmarks.sweeps run value_head        # runs what is missing, one after the other
    python -m benchmarks.sweeps show value_head       # the table of what is there

A run counts for the settings that it was made with: where a preset changes, its runs are made again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.train_step import markdown
from megarl.config.compose import compose
from megarl.tasks.randomwalks import MOST_NODES, task

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "sweeps.jsonl"
TORCH, NARROW = "torch", "narrow"
GRAPHS = (1000, 1005, 1008)  # of the short gates
FIVE_GRAPHS = (1000, 1002, 1005, 1008, 1016)
PRESETS = {
    **dict.fromkeys(("a2c", "nlpo"), "ppo"),
    **dict.fromkeys(("dapo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_pp"), "grpo"),
}
"""Presets of algorithms, and their entry points."""
GATEWAYS = (1011, 1032, 1055)  # graphs in which a single node leads to the goal
SETTLED = 5  # last evaluations that are averaged
COLLAPSED = 0.5  # of the best evaluation: a settled run below that has collapsed
ASIDE = ("run", "logger", "checkpoint", "export", "health", "debug")  # sections that decide no number
QUIET = ("trainer.progress=none", "logger.tensorboard=false", "checkpoint.every=null", "checkpoint.best.keep=0")


@dataclass(frozen=True)
class Case:
    """One run: an entry point, a preset with settings, and how a value head's weights start."""

    entry: str
    preset: str
    settings: tuple[str, ...]
    metric: str
    head: str = TORCH

    @property
    def overrides(self) -> list[str]:
        return [f"+conf={self.preset}", *self.settings]

    def fingerprint(self) -> str:
        """A digest of what decides the run's numbers. Keys that are off do not count: a new one changes nothing."""
        _, plain = compose(self.entry, self.overrides)
        decides = {name: _set(section) for name, section in plain.items() if name not in ASIDE}
        text = json.dumps([decides, self.head], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def learnable(graph: int) -> bool:
    """Whether every start of a graph has a path to the goal that is short enough."""
    found = task(graph)
    return all(found.shortest[start] < MOST_NODES for start in found.starts)


def walks(graph: int, seed: int, *settings: str, entry: str = "ppo", head: str = TORCH) -> Case:
    own = (f"data.options.seed={graph}", f"seed={seed}", *settings)
    return Case(entry, "randomwalks", own, "eval/optimality", head)


def value_head() -> Iterator[Case]:
    """Initial weights of the value head as torch's linear layers have them, and narrow ones (deviation .02, then 0),
    without the limit that stops a phase."""
    for seed in range(11, 19):
        for graph in GATEWAYS:
            for head in (TORCH, NARROW):
                yield walks(graph, seed, "ppo.stop_at_kl=null", head=head)
    for seed in range(11, 19):
        for head in (TORCH, NARROW):
            yield Case("ppo", "sentiment", (f"seed={seed}", "ppo.stop_at_kl=null"), "eval/score", head)


def stop_at_kl() -> Iterator[Case]:
    """Limits of the KL within a phase: with the head and the seeds that lost everything, and with those that hold."""
    for seed in (7, 1, 3):
        for limit in ("null", "0.3", "0.2", "0.1"):
            yield walks(GATEWAYS[0], seed, f"ppo.stop_at_kl={limit}", head=NARROW)
    for seed in range(11, 15):
        for limit in ("0.3", "0.2", "0.1"):
            yield walks(GATEWAYS[0], seed, f"ppo.stop_at_kl={limit}")


def ppo() -> Iterator[Case]:
    """PPO on every learnable graph from 1000 to 1020."""
    for seed in (1, 2, 3):
        yield from (walks(graph, seed) for graph in range(1000, 1021) if learnable(graph))


def grpo() -> Iterator[Case]:
    """Advantages without a critic, with PPO's preset and number of samples."""
    for seed in (1, 2, 3):
        for graph in GRAPHS:
            for kind in ("grpo", "rloo"):
                yield walks(graph, seed, f"ppo.advantages={kind}", entry="grpo")


def on_policy() -> Iterator[Case]:
    """Presets of algorithms on the preset of the walks: those with a critic on five graphs with three seeds each, the
    others on three graphs with a seed each."""
    for seed, graph in enumerate(GRAPHS, 1):
        for preset, entry in PRESETS.items():
            if entry == "grpo":
                yield _walks_of(preset, graph, seed)
    for seed in (1, 2, 3):
        for graph in FIVE_GRAPHS:
            for preset, entry in PRESETS.items():
                if entry == "ppo":
                    yield _walks_of(preset, graph, seed)


def _walks_of(preset: str, graph: int, seed: int) -> Case:
    own = (f"data.options.seed={graph}", f"seed={seed}")
    return Case(PRESETS[preset], f"[randomwalks,{preset}]", own, "eval/optimality")


def arithmetic() -> Iterator[Case]:
    """The same presets, PPO and GRPO on sums. DAPO has fewer phases: it solves all sums, and then finds nothing more to
    learn from."""
    for seed in (1, 2, 3):
        for entry in ("ppo", "grpo"):
            yield Case(entry, "arithmetic", (f"seed={seed}",), "eval/score")
        for preset, entry in PRESETS.items():
            fewer = ("trainer.max_phases=60",) if preset == "dapo" else ()
            yield Case(entry, f"[arithmetic,{preset}]", (f"seed={seed}", *fewer), "eval/score")


def refresh() -> Iterator[Case]:
    """How often NLPO's copy takes the policy's weights, on sums."""
    seldom = "ppo.action_mask.refresh_every=5"
    for own in ((), (seldom,), (seldom, "ppo.action_mask.top_p=0.98")):
        yield Case("ppo", "[arithmetic,nlpo]", ("seed=1", *own), "eval/score")


def countdown() -> Iterator[Case]:
    """PPO and GRPO on expressions with a given value."""
    for seed in (1, 2, 3):
        for entry in ("ppo", "grpo"):
            yield Case(entry, "countdown", (f"seed={seed}",), "eval/score")


def ilql() -> Iterator[Case]:
    """ILQL on every learnable graph from 1000 to 1020."""
    for seed in (1, 2, 3):
        for graph in filter(learnable, range(1000, 1021)):
            own = (f"data.options.seed={graph}", f"seed={seed}")
            yield Case("ilql", "randomwalks_ilql", own, "eval/optimality@beta=100")


SWEEPS: dict[str, Callable[[], Iterator[Case]]] = {
    "value_head": value_head,
    "stop_at_kl": stop_at_kl,
    "ppo": ppo,
    "grpo": grpo,
    "ilql": ilql,
    "on_policy": on_policy,
    "arithmetic": arithmetic,
    "refresh": refresh,
    "countdown": countdown,
}
NOTED = ("policy/approx_kl_max", "rollout/whitening_factor", "value/loss")  # series that are kept beside the metric


def run_case(case: Case) -> dict[str, Any]:
    """Run a case in its own process and return its line: what it was, and the series of its metric."""
    began, cpu_began = time.monotonic(), _cpu_of_children()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sweeps", "one", case.entry, case.head, *case.overrides, *QUIET]
        done = subprocess.run(
            [*command, f"run.dir={folder}/run"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{case} ended with {done.returncode}: {done.stderr[-2000:]}")
        series = read_series(Path(folder, "run", "metrics.csv"), (case.metric, *NOTED))
    return {
        **asdict(case),
        "fingerprint": case.fingerprint(),
        "commit": _commit(),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(_cpu_of_children() - cpu_began, 1),
        "series": series,
    }


def read_series(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """The values of some columns of a run's metrics.csv, in their order."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [round(float(row[name]), 5) for row in rows if row.get(name)] for name in names}


def known(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Finished runs by fingerprint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["fingerprint"]: line for line in map(json.loads, lines)}


def settled(values: Sequence[float]) -> float:
    """The mean of the last evaluations."""
    last = values[-SETTLED:]
    return sum(last) / len(last)


def show(cases: Sequence[Case], finished: dict[str, dict[str, Any]]) -> str:
    """A row for each group of cases that differ in their seed alone."""
    groups: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    missing: dict[tuple[str, ...], int] = defaultdict(int)
    for case in cases:
        name = (case.preset, *(part for part in case.settings if not part.startswith("seed=")), f"head={case.head}")
        line = finished.get(case.fingerprint())
        if line is None:
            missing[name] += 1
        else:
            groups[name].append(line["series"][case.metric])
    rows = []
    for name in dict.fromkeys([*groups, *missing]):
        runs = groups[name]
        ends = [settled(values) for values in runs]
        fell = sum(end < COLLAPSED * max(values) for end, values in zip(ends, runs, strict=True))
        numbers = [f"{sum(ends) / len(ends):.3f}", f"{min(ends):.3f}", str(fell)] if runs else ["", "", ""]
        rows.append([" ".join(name), str(len(runs)), str(missing[name]), *numbers])
    return markdown(["runs", "done", "missing", "mean", "least", "collapsed"], rows)


def run_missing(cases: Sequence[Case], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, 1):
        if case.fingerprint() in known(path):
            continue
        line = run_case(case)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        end = settled(line["series"][case.metric])
        print(f"{number} of {len(cases)}: {' '.join(case.overrides)} {case.head} {end:.3f}", flush=True)


def one(entry: str, head: str, overrides: Sequence[str]) -> None:
    """A run in this process, with the value head's weights as asked."""
    import importlib

    if head == NARROW:
        overrides = [*overrides, "ppo.invariants=warn"]  # the inner layer has no gradient in the first step
    sys.argv = [entry, *overrides]
    with initial_weights(head):
        importlib.import_module(f"megarl.train_{entry}").main()


def initial_weights(head: str) -> AbstractContextManager[Any]:
    """A context in which value heads start as `head` says."""
    from megarl.models.heads import ValueHead

    def narrow(weight: Tensor) -> float:
        return 0.0 if weight.shape[0] == 1 else 0.02

    return patch.object(ValueHead, "std", narrow) if head == NARROW else nullcontext()


def _set(section: Any) -> Any:
    """A section's keys that have a value other than null, false and empty."""
    if not isinstance(section, dict):
        return section
    return {key: _set(value) for key, value in section.items() if value not in (None, False, "", [], {})}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["one"]:  # its overrides are Hydra's, not argparse's
        one(given[1], given[2], given[3:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=__doc__.partition("\n\n")[0])
    parser.add_argument("verb", choices=("run", "show"))
    parser.add_argument("sweep", choices=tuple(SWEEPS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(given)
    cases = list(SWEEPS[options.sweep]())
    if options.verb == "run":
        run_missing(cases, options.results)
    print(show(cases, known(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
