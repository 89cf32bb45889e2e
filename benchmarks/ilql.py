"""ILQL on the randomwalks task: CPU seconds of a whole run after start-up, by part, beside the floor that its matrix
products set on this machine. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.ilql --peer-seconds 62
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from benchmarks.rates import product_rate
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.data.offline import open_store
from megarl.experience.rows import training_flops
from megarl.models.exchange.pretrained import Sources
from megarl.modules.base import Module
from megarl.modules.ilql import ILQL
from megarl.run.runner import run_training
from megarl.tokenizers import build_tokenizer

HEADER = ["part", "CPU s", "share of all", "share that is matrix products", "at torch.mm's rate"]
FORWARD_AND_BACKWARD = 3
AnyModule = TypeVar("AnyModule", bound=Module)


class AfterStartUp(LightningModule):
    """A module that notes when its models stand and the run begins."""

    begun = 0.0  # CPU seconds of the process

    def on_fit_start(self) -> None:
        self.begun = time.process_time()
        super().on_fit_start()


class Watched(AfterStartUp, ILQL):
    pass


def fitted(entry: str, config: Any, kind: type[AnyModule]) -> AnyModule:
    """A module of the kind after the whole run that the configuration describes."""
    built: list[AnyModule] = []

    def build(resolved: Any, sources: Sources) -> AnyModule:
        tokenizer = build_tokenizer(resolved.tokenizer.kind, resolved.tokenizer.path)
        built.append(kind(resolved, tokenizer, sources=sources))
        return built[0]

    run_training(entry, config, build)
    return built[0]


def head_flops(hidden: int, vocab_size: int, q_heads: int) -> float:
    """Of V, the Q heads (forward and backward) and their targets (forward, taken tokens only), per action."""
    inner, outer = 2 * hidden * 2 * hidden, 2 * 2 * hidden * vocab_size
    trained = inner + 2 * 2 * hidden + q_heads * (inner + outer)
    return FORWARD_AND_BACKWARD * trained + q_heads * (inner + 2 * 2 * hidden)


def flops_of_all_steps(config: Any) -> float:
    """What the mathematics needs, padding not counted."""
    tokenizer = build_tokenizer(config.tokenizer.kind, config.tokenizer.path)
    store = open_store(config.data, tokenizer)
    heads = head_flops(config.model.hidden_size, tokenizer.size, 2 if config.ilql.two_qs else 1)
    once = training_flops(config.model, tokenizer.size, torch.as_tensor(store.lengths))
    once += float(store.arrays["action_mask"].sum()) * heads
    return once / len(store) * config.trainer.global_batch_size * config.trainer.max_steps


@dataclass(frozen=True)
class Floor:
    """CPU seconds that the matrix products of training take: at the fastest product's rate, and at torch.mm's."""

    fastest: float
    plain: float

    @classmethod
    def of(cls, flops: float, rows: int, hidden: int) -> "Floor":
        """At the rates of the widest product in a layer."""
        clock = time.process_time
        return cls(*(flops / product_rate(rows, hidden, 4 * hidden, own=own, clock=clock) for own in (True, False)))

    def shares(self, seconds: float) -> list[str]:
        return [f"{self.fastest / seconds:.0%}", f"{self.plain / seconds:.0%}"]

    def rows(self, spent: float) -> list[list[str]]:
        """Of the table, its last two."""
        return [
            ["all after start-up", f"{spent:.1f}", "100%", *self.shares(spent)],
            ["matrix products of training alone", f"{self.fastest:.1f}", "", "", f"{self.plain:.1f} s"],
        ]


def measure(overrides: Sequence[str]) -> tuple[dict[str, float], float, Floor]:
    """CPU seconds of each part, all of them after start-up, and the floor of training."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"run.dir={folder}/run", "trainer.progress=none", "logger.tensorboard=false"]
        config, _ = compose("ilql", ["+conf=randomwalks_ilql", *quiet, *overrides])
        module = fitted("ilql", config, Watched)
        spent = time.process_time() - module.begun
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        best = summary["metrics"].get("eval/optimality@beta=100")
        if best is not None:
            print(f"optimality at beta 100, mean of the last five evaluations: {best['last5']:.3f}")
        parts = {name: seconds["cpu_s"] for name, seconds in summary["seconds"].items()}
        rows = config.trainer.micro_batch_size * config.data.seq_length
        return parts, spent, Floor.of(flops_of_all_steps(config), rows, config.model.hidden_size)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ilql", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peer-seconds", type=float, help="CPU seconds of another program for the same steps")
    parser.add_argument("--limit", type=float, help="exit with 1 if ours over the peer's is above this")
    parser.add_argument("overrides", nargs="*", help="settings of the run, such as trainer.max_steps=20")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(describe(torch.device("cpu")))
    parts, spent, floor = measure(options.overrides)
    rows = [
        [name, f"{seconds:.1f}", f"{seconds / spent:.0%}", *(floor.shares(seconds) if name == "train" else ["", ""])]
        for name, seconds in parts.items()
    ]
    others = spent - sum(parts.values())
    rows.append(["the rest (loop, logging)", f"{others:.1f}", f"{others / spent:.0%}", "", ""])
    print(markdown(HEADER, rows + floor.rows(spent)))
    if options.peer_seconds is None:
        return 0
    ratio = spent / options.peer_seconds
    print(f"beside the peer's {options.peer_seconds:g} s: {ratio:.2f}")
    return int(options.limit is not None and ratio > options.limit)


if __name__ == "__main__":
    sys.exit(main())
