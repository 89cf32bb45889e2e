"""Whole runs of an entry point inside the test's worker processes, and what they leave behind."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.checkpoint import find, tensors
from megarl.errors import MegarlError

# A model small enough that a step costs milliseconds; every layout up to 4 processes divides it.
SMALL = [
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_heads=4",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.eval_batch_size=8",
    "trainer.eval_every=null",
    "data.seq_length=64",
    "data.eval_limit=16",
    "checkpoint.every=null",
    "trainer.log_every=1",
    "trainer.progress=none",
    "logger.tensorboard=false",
    "optim.warmup_steps=4",
]


# Preferences of the small model, 12 steps of 6 pairs or responses.
PAIRS = [
    *SMALL,
    "model.num_layers=2",
    "model.hidden_size=32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.eval_batch_size=4",
    "trainer.max_steps=12",
    "trainer.eval_every=6",
    "optim.lr=1e-3",
    "optim.schedule=constant",
    "data.seq_length=48",
    "checkpoint.best.keep=0",
]


@contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun would give this rank of the current world."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    before = dict(os.environ)
    os.environ.update(
        {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",  # unused: the group exists
        }
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# PPO on the walks of a graph: a little cloning, then phases of 16 responses in two minibatches.
WALKS = [
    "+conf=randomwalks",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "clone.steps=6",
    "ppo.rollouts=16",
    "ppo.inner_epochs=2",
    "ppo.kl_coef=0.1",
    "trainer.max_phases=2",
    "optim.schedule=constant",  # of runs that are cut short, too
    "trainer.global_batch_size=12",
    "trainer.micro_batch_size=6",
    "trainer.eval_every=null",
    "checkpoint.every=null",
    "checkpoint.save_last=false",
    "trainer.progress=none",
    "logger.tensorboard=false",
]


# ILQL on the walks of a graph, 12 steps of 12.
OFFLINE_WALKS = [
    "+conf=randomwalks_ilql",
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=4",
    "data.seq_length=12",
    "optim.lr=1e-3",
    "trainer.max_steps=12",
    "trainer.global_batch_size=12",
    "trainer.micro_batch_size=6",
    "trainer.eval_every=null",
    "trainer.log_every=1",
    "checkpoint.every=null",
    "trainer.progress=none",
    "logger.tensorboard=false",
]


def run_sft(run_dir: Path, *overrides: str) -> None:
    """Run in the current world, as under torchrun."""
    run_entry("sft", [*SMALL, f"run.dir={run_dir}", *overrides])


def run_ppo(run_dir: Path, *overrides: str) -> None:
    """Run in the current world, as under torchrun."""
    run_entry("ppo", [*WALKS, f"run.dir={run_dir}", *overrides])


def run_rft(run_dir: Path, *overrides: str) -> None:
    """Run in the current world, as under torchrun."""
    walks = [setting for setting in WALKS[1:] if not setting.startswith("ppo.")]
    run_entry("rft", ["+conf=randomwalks_rft", "rollout.n=8", *walks, f"run.dir={run_dir}", *overrides])


def run_ilql(run_dir: Path, *overrides: str) -> None:
    """Run in the current world, as under torchrun."""
    run_entry("ilql", [*OFFLINE_WALKS, f"run.dir={run_dir}", *overrides])


def run_preference(run_dir: Path, entry: str, data: Path, *overrides: str) -> None:
    """Train on pairs of this rank's world; `data` holds train.jsonl and eval.jsonl."""
    files = [f"data.train=[{data / 'train.jsonl'}]", f"data.eval=[{data / 'eval.jsonl'}]"]
    run_entry(entry, [*PAIRS, *files, f"run.dir={run_dir}", *overrides])


def run_entry(entry: str, settings: list[str]) -> None:
    """Run an entry point in the current world, as under torchrun."""
    from megarl.training import train

    with launched():
        assert train(entry, composed(entry, settings)) == 0


def composed(entry: str, settings: list[str]) -> Any:
    """Return the configuration that every rank of the current world would compose; rank 0 does, as it takes a while."""
    from megarl.config.compose import compose

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found[0], _ = compose(entry, settings)
        except MegarlError as refusal:
            found[0] = refusal
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], MegarlError):
        raise found[0]
    return found[0]


@contextmanager
def updates_written_to(path: Path) -> Iterator[None]:
    """A context in which rank 0 appends the metrics of every update of PPO to a file, a line of JSON each."""
    from megarl.modules.ppo import PPO

    plain = PPO._means

    def means(self: PPO, collected: Sequence[dict[str, float]]) -> dict[str, float]:
        if self.grid.rank == 0:
            with path.open("a") as file:
                file.writelines(json.dumps(stats) + "\n" for stats in collected)
        return plain(self, collected)

    PPO._means = means  # type: ignore[method-assign]
    try:
        yield
    finally:
        PPO._means = plain  # type: ignore[method-assign]


def updates(path: Path, *names: str) -> list[tuple[float, ...]]:
    """Some metrics of every update in a file of `updates_written_to`."""
    return [tuple(json.loads(line)[name] for name in names) for line in path.read_text().splitlines()]


def metrics(run_dir: Path, *names: str) -> list[tuple[float, ...]]:
    """The logged values of some metrics, step by step, where all were logged."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [tuple(float(row[name]) for name in names) for row in rows if all(row.get(name) for name in names)]


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """The records of every start of a run, in order."""
    return [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the newest checkpoint, put together from its shards."""
    return tensors(find(run_dir / "checkpoints")[-1])


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} among them"
