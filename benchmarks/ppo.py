"""PPO on the randomwalks task: CPU seconds of a whole run after start-up, by part, beside the floor that its matrix
products set on this machine. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo --peer-seconds 43
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ilql import products_per_second
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.config.schema import PPOConfig
from megarl.modules.fit import fit
from megarl.modules.ppo import PPO
from megarl.tokenizers import build_tokenizer

HEADER = ["part", "CPU s", "share of all", "share that is matrix products"]
NAMED = ("generate", "score", "evaluate", "train")


class Counted(PPO):
    """PPO that adds up what its phases' training needs in operations, padding not counted."""

    flops = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.flops += self.training_flops


@dataclass
class Measured:
    """CPU seconds of the parts, of all after start-up without cloning, and the floor of the training part."""

    parts: dict[str, float]
    spent: float
    floor: float
    optimality: float


def measure(overrides: Sequence[str]) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"run.dir={folder}/run", "trainer.progress=none", "logger.tensorboard=false"]
        config, _ = compose("ppo", ["+conf=randomwalks", *quiet, *overrides])
        built: list[Counted] = []

        def build(resolved: PPOConfig) -> PPO:
            built.append(Counted(resolved, build_tokenizer(resolved.tokenizer.kind, resolved.tokenizer.path)))
            return built[0]

        rows = config.trainer.global_batch_size * (config.rollout.max_new_tokens + 1)
        rate = products_per_second(rows, config.model.hidden_size)
        start = time.process_time()
        fit("ppo", config, build)
        spent = time.process_time() - start
        rate = max(rate, products_per_second(rows, config.model.hidden_size))
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    parts = {name: seconds["cpu_s"] for name, seconds in summary["seconds"].items()}
    clone = parts.pop("clone", 0.0)
    print(f"cloning before the first phase, not counted below: {clone:.1f} CPU s")
    return Measured(parts, spent - clone, built[0].flops / rate, summary["metrics"]["eval/optimality"]["last5"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peer-seconds", type=float, help="CPU seconds of another program for the same phases")
    parser.add_argument("--limit", type=float, help="exit with 1 if ours over the peer's is above this")
    parser.add_argument("overrides", nargs="*", help="settings of the run, such as trainer.max_phases=2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(describe(torch.device("cpu")))
    found = measure(options.overrides)
    print(f"optimality, mean of the last five evaluations: {found.optimality:.3f}")
    rows = [
        [
            name,
            f"{seconds:.1f}",
            f"{seconds / found.spent:.0%}",
            f"{found.floor / seconds:.0%}" if name == "train" else "",
        ]
        for name, seconds in found.parts.items()
    ]
    others = found.spent - sum(found.parts.values())
    rows.append(["the rest (model, loop, logging)", f"{others:.1f}", f"{others / found.spent:.0%}", ""])
    rows.append(["all after start-up", f"{found.spent:.1f}", "100%", f"{found.floor / found.spent:.0%}"])
    rows.append(["matrix products of training alone", f"{found.floor:.1f}", "", ""])
    print(markdown(HEADER, rows))
    other = found.spent - sum(found.parts.get(name, 0.0) for name in NAMED)
    print(f"other than {', '.join(NAMED)}: {other / found.spent:.0%}")
    if options.peer_seconds is None:
        return 0
    ratio = found.spent / options.peer_seconds
    print(f"beside the peer's {options.peer_seconds:g} s: {ratio:.2f}")
    return int(options.limit is not None and ratio > options.limit)


if __name__ == "__main__":
    sys.exit(main())
