"""PPO on the randomwalks task: CPU seconds of a whole run after start-up, by part, beside the floor that its matrix
products set on this machine. With --trl: samples per second beside TRL's PPO trainer, on the same shape, batch and
lengths. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo --peer-seconds 43
    OMP_NUM_THREADS=1 python -m benchmarks.ppo --trl ../trl/bin/python
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.ilql import HEADER, AfterStartUp, Floor, fitted
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.config.ppo import PPOConfig
from megarl.modules.ppo import PPO
from megarl.parallel.vocab import padded_vocab
from megarl.tokenizers import Tokenizer, build_tokenizer

NAMED = ("generate", "score", "evaluate", "train")

PEER_BATCHES = ["ppo.rollouts=128", "trainer.global_batch_size=100", "trainer.micro_batch_size=100", "clone.steps=400"]
TRL_HEADER = ["PPO", "critic", "reference", "samples/s (CPU)", "samples/s (wall)", "ratio (CPU)", "ratio (wall)"]
TRL_SCRIPT = Path(__file__).parent / "peers" / "trl_ppo.py"
PHASES_ALONE = [
    "clone.data=[]",
    "data.eval=[]",
    "metric.fn=null",
    "trainer.eval_every=null",
    "checkpoint.every=null",
    "checkpoint.save_last=false",
    "trainer.global_batch_size=64",  # TRL wants minibatches of one size
    "trainer.micro_batch_size=64",
]
TRL_WORK = ("own model", "yes")  # critic and reference of TRL's trainer, which has no others
VARIANTS = {
    TRL_WORK: ["critic.kind=separate", "ppo.kl_coef=0.05"],
    ("head", "yes"): ["critic.kind=shared", "ppo.kl_coef=0.05"],
    ("head", "no"): ["critic.kind=shared", "ppo.kl_coef=0"],
}


class Counted(AfterStartUp, PPO):
    """PPO that adds up what its phases' training needs in operations, padding not counted."""

    flops = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.flops += self.training_flops


@dataclass
class Measured:
    """CPU seconds of the parts, of all after start-up without cloning, and the floor of the training part."""

    parts: dict[str, float]
    spent: float
    floor: Floor
    optimality: float


def randomwalks(folder: str, overrides: Sequence[str]) -> PPOConfig:
    """The preset, with as many rollouts and minibatches as the peer's run has."""
    quiet = [f"run.dir={folder}/run", "trainer.progress=none", "logger.tensorboard=false"]
    config, _ = compose("ppo", ["+conf=randomwalks", *quiet, *PEER_BATCHES, *overrides])
    return config


def measure(overrides: Sequence[str]) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        config = randomwalks(folder, overrides)
        module = fitted("ppo", config, Counted)
        spent = time.process_time() - module.begun
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    parts = {name: seconds["cpu_s"] for name, seconds in summary["seconds"].items()}
    clone = parts.pop("clone", 0.0)
    print(f"cloning before the first phase, not counted below: {clone:.1f} CPU s")
    rows = config.trainer.global_batch_size * (config.rollout.max_new_tokens + 1)
    floor = Floor.of(module.flops, rows, config.model.hidden_size)
    return Measured(parts, spent - clone, floor, summary["metrics"]["eval/optimality"]["last5"])


# --- beside TRL -------------------------------------------------------------------------------------------------------


class Timed(PPO):
    """PPO that draws no end of sequence and reads the clocks at the end of every phase; the scoring process counts
    too."""

    def __init__(self, config: PPOConfig, tokenizer: Tokenizer, **given: Any) -> None:
        tokenizer.eos_id = tokenizer.size
        super().__init__(config, tokenizer, **given)
        self.marks: list[tuple[float, float]] = []  # seconds on the wall and on a core

    def on_train_batch_end(self, *_: Any) -> None:
        others = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
        cpu = time.process_time() + sum(spent.user + spent.system for spent in others)
        self.marks.append((time.perf_counter(), cpu))


@dataclass
class Speed:
    """Samples per second of the phases after the first one, and how many weights the policy has."""

    wall: float
    cpu: float
    parameters: int


def our_speed(config: PPOConfig) -> Speed:
    """Of phases in which no end of sequence is drawn, so that all responses are as long as TRL's."""
    module = fitted("ppo", config, Timed)
    samples = config.ppo.rollouts * (len(module.marks) - 1)
    wall, cpu = (end - start for start, end in zip(module.marks[0], module.marks[-1], strict=True))
    padding = (padded_vocab(module.vocab_size, 1) - module.vocab_size) * config.model.hidden_size
    weights = sum(weight.numel() for name, weight in module.policy.parameters() if "value_head" not in name)
    return Speed(samples / wall, samples / cpu, weights - padding)


def their_speed(python: str, config: PPOConfig) -> tuple[Speed, str]:
    """And the versions that made it."""
    model = config.model
    sizes = {
        "layers": model.num_layers,
        "width": model.hidden_size,
        "heads": model.num_heads,
        "positions": model.max_positions,
        "vocab_size": build_tokenizer(config.tokenizer.kind, config.tokenizer.path).size,
        "prompts": config.ppo.rollouts,
        "new_tokens": config.rollout.max_new_tokens,
        "inner_epochs": config.ppo.inner_epochs,
        "minibatch": config.trainer.global_batch_size,
        "phases": config.trainer.max_phases - 1,
    }
    done = subprocess.run(
        [python, str(TRL_SCRIPT), json.dumps(sizes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    versions = found.pop("versions")
    return Speed(**found), versions


def trl_rows(ours: dict[tuple[str, str], Speed], theirs: Speed) -> list[list[str]]:
    rows = []
    for variant, speed in ours.items():
        if speed.parameters != theirs.parameters:
            raise AssertionError(f"{speed.parameters} parameters here, {theirs.parameters} in TRL")
        ratios = [f"{speed.cpu / theirs.cpu:.2f}", f"{speed.wall / theirs.wall:.2f}"]
        rows.append(["megarl", *variant, f"{speed.cpu:.1f}", f"{speed.wall:.1f}", *ratios])
    return [*rows, ["TRL", *TRL_WORK, f"{theirs.cpu:.1f}", f"{theirs.wall:.1f}", "", ""]]


def beside_trl(python: str, overrides: Sequence[str]) -> float:
    """Print the table; the largest ratio of CPU seconds per sample, ours over TRL's."""
    # First, because a run of ours leaves variables of torch.distributed behind, which TRL would take for its own.
    theirs, versions = their_speed(python, randomwalks("unused", [*PHASES_ALONE, *overrides]))
    ours: dict[tuple[str, str], Speed] = {}
    for variant, needed in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            ours[variant] = our_speed(randomwalks(folder, [*PHASES_ALONE, *needed, *overrides]))
    print(f"beside {versions}")
    print(markdown(TRL_HEADER, trl_rows(ours, theirs)))
    return max(theirs.cpu / speed.cpu for speed in ours.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peer-seconds", type=float, help="CPU seconds of another program for the same phases")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL: compare with its PPO")
    parser.add_argument("--limit", type=float, help="exit with 1 if ours over the peer's is above this")
    parser.add_argument("overrides", nargs="*", help="settings of the run, such as trainer.max_phases=2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(describe(torch.device("cpu")))
    if options.trl is not None:
        ratio = beside_trl(options.trl, options.overrides)
        return int(options.limit is not None and ratio > options.limit)
    found = measure(options.overrides)
    print(f"optimality, mean of the last five evaluations: {found.optimality:.3f}")
    rows = [
        [
            name,
            f"{seconds:.1f}",
            f"{seconds / found.spent:.0%}",
            *(found.floor.shares(seconds) if name == "train" else ["", ""]),
        ]
        for name, seconds in found.parts.items()
    ]
    others = found.spent - sum(found.parts.values())
    rows.append(["the rest (loop, logging)", f"{others:.1f}", f"{others / found.spent:.0%}", "", ""])
    print(markdown(HEADER, rows + found.floor.rows(found.spent)))
    other = found.spent - sum(found.parts.get(name, 0.0) for name in NAMED)
    evaluated = found.parts.get("eval", 0.0)
    print(f"other than {', '.join(NAMED)}: {other / found.spent:.0%}", end="; ")
    print(f"without the evaluations (eval) too: {(other - evaluated) / found.spent:.0%}")
    if options.peer_seconds is None:
        return 0
    ratio = found.spent / options.peer_seconds
    print(f"beside the peer's {options.peer_seconds:g} s: {ratio:.2f}")
    return int(options.limit is not None and ratio > options.limit)


if __name__ == "__main__":
    sys.exit(main())
