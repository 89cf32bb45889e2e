"""What it costs to prove that weights arrived where responses are generated: the share of a phase of the randomwalks
preset that trains in one layout and generates in another, and nanoseconds per value of a checksum. Prints two tables.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.arrival
    python -m benchmarks.arrival --device cuda
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ilql import fitted
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.experience.arrival import Arrival
from megarl.experience.invariants import Invariants
from megarl.modules.ppo import PPO
from megarl.parallel.digest import digest
from megarl.parallel.reshard import Reshard

PARTS: list[tuple[str, type, str]] = [
    ("a phase", PPO, "training_step"),
    ("copying the weights", Reshard, "refresh"),
    ("the whole proof", Arrival, "check"),
    ("of it, checksums", Invariants, "arrived"),
]
SIZES = {"float32": (4096, 4096), "bfloat16": (4096, 4096)}


def timed(seconds: list[float], plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return plain(*given, **named)
        finally:
            seconds.append(time.perf_counter() - begun)

    return call


def of_phases(phases: int, settings: list[str]) -> None:
    """Print the median seconds of each part, without the first phase."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for name, owner, method in PARTS:
        setattr(owner, method, timed(seconds[name], getattr(owner, method)))
    folder = Path(tempfile.gettempdir(), f"arrival-{os.environ['MASTER_PORT']}")  # the same in all processes
    quiet = [f"run.dir={folder}", "trainer.progress=none", "logger.tensorboard=false", "trainer.eval_every=null"]
    layouts = ["parallel.pp=2", "rollout.engine.layout=tp2", f"trainer.max_phases={phases}"]
    config, _ = compose("ppo", ["+conf=randomwalks", *quiet, *layouts, *settings])
    fitted("ppo", config, PPO)
    shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    rows = [[name, f"{1e3 * one:.1f}", f"{one / medians['a phase']:.2%}"] for name, one in medians.items()]
    if int(os.environ["RANK"]) == 0:
        print(markdown(["part", "ms", "share of a phase"], rows), flush=True)


def of_values(device: torch.device) -> None:
    """Print the time of a checksum, per value."""
    rows = []
    for kind, shape in SIZES.items():
        tensor = torch.randn(shape, device=device).to(getattr(torch, kind))
        seconds: list[float] = []
        for _ in range(4):
            timed(seconds, digest)(tensor)
        rows.append([f"{kind}, {shape[0]} x {shape[1]}", f"{1e9 * min(seconds) / tensor.numel():.3f}"])
    print(markdown(["tensor", "ns per value"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--phases", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="cuda: the second table alone, on a GPU")
    given, settings = parser.parse_known_args()
    device = torch.device(given.device)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(describe(device), flush=True)
    if device.type == "cpu":
        of_phases(given.phases, settings)
    if first:
        of_values(device)


if __name__ == "__main__":
    main()
