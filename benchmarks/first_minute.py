"""The first minute: CPU seconds after imports until the demo's paths first score .9, over graphs and seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.first_minute
    OMP_NUM_THREADS=1 python -m benchmarks.first_minute --library mkl --seeds 1 2 --graphs 1000 --limit 90

Every run is a process of its own, one after the other. It counts from the end of the imports: composing, building,
cloning, PPO and evaluations, of the process and of the one that scores. Prints one table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import psutil
import torch

from benchmarks.ilql import fitted
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.modules.ppo import PPO
from megarl.parallel import products

METRIC, WANTED = "eval/optimality", 0.9
HEADER = ["graph", "seed", "CPU s until .9", "of it cloning", "phases until .9", "cloned", "at last", "CPU s in all"]
LIBRARIES = {"onednn": True, "mkl": False}


def spent() -> float:
    """CPU seconds of this process and the one that scores."""
    others = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in others)


class Watched(PPO):
    """PPO that notes the CPU time of every evaluation."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.measured: list[tuple[float, float]] = []  # CPU seconds, score

    def evaluate(self) -> Any:
        """Evaluate and note when."""
        evaluated = super().evaluate()
        self.measured.append((spent(), evaluated.metrics[METRIC]))
        return evaluated


@dataclass(frozen=True)
class Result:
    """What a run came to. Seconds are of a CPU, after imports; None: .9 was never reached."""

    graph: int
    seed: int
    until: float | None
    cloning: float
    phases: int | None
    cloned: float
    last: float
    all: float

    def row(self) -> list[str]:
        until = "never" if self.until is None else f"{self.until:.1f}"
        phases = "" if self.phases is None else str(self.phases)
        scores = [f"{self.cloned:.2f}", f"{self.last:.2f}"]
        return [str(self.graph), str(self.seed), until, f"{self.cloning:.1f}", phases, *scores, f"{self.all:.1f}"]


def measure(preset: str, graph: int, seed: int, overrides: Sequence[str]) -> Result:
    """Run the demo in this process."""
    start = spent()
    with tempfile.TemporaryDirectory() as folder:
        own = [f"+conf={preset}", f"data.options.seed={graph}", f"seed={seed}", f"run.dir={folder}/run"]
        config, _ = compose("ppo", [*own, "trainer.progress=none", *overrides])
        module = fitted("ppo", config, Watched)
        found = module.measured
        first = next((index for index, (_, score) in enumerate(found) if score >= WANTED), None)
        return Result(
            graph,
            seed,
            None if first is None else found[first][0] - start,
            module.clock.totals()["clone"]["cpu_s"],
            None if first is None else first * config.trainer.eval_every,
            found[0][1],
            found[-1][1],
            spent() - start,
        )


def in_process(options: argparse.Namespace, graph: int, seed: int) -> Result:
    """Run the demo in a new process, whose imports are done before it counts."""
    choices = [f"--library={options.library}"] if options.library else []
    command = [sys.executable, "-m", "benchmarks.first_minute", *choices, f"--preset={options.preset}"]
    words = [*command, f"--one={graph},{seed}", *options.overrides]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_minute", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="a run for each on every graph")
    parser.add_argument("--graphs", type=int, nargs="+", default=[1000, 1011], help="values of data.options.seed")
    parser.add_argument("--library", choices=LIBRARIES, help="what multiplies matrices, instead of the rule's choice")
    parser.add_argument("--preset", default="demo", help="the preset of the runs")
    parser.add_argument("--limit", type=float, help="exit with 1 if a run takes more CPU seconds until .9")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings of the runs, such as trainer.max_phases=10")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    if options.library:
        if LIBRARIES[options.library]:
            for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
                os.environ.setdefault(name, str(products.KERNELS_KEPT))
        patch.object(products, "onednn_is_faster", lambda: LIBRARIES[options.library]).start()
    if options.one:
        graph, seed = map(int, options.one.split(","))
        print(json.dumps(asdict(measure(options.preset, graph, seed, options.overrides))))
        return 0
    print(f"{describe(torch.device('cpu'))}, {products.library()}")
    results = [in_process(options, graph, seed) for graph in options.graphs for seed in options.seeds]
    print(markdown(HEADER, [result.row() for result in results]))
    late = [one for one in results if one.until is None or (options.limit is not None and one.until > options.limit)]
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
