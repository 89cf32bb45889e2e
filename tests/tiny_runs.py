"""Runs that are all checkpoints: one weight of a few numbers under the real strategy, loop and checkpoint I/O."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megarl.callbacks.checkpoints import Checkpoints
from megarl.checkpoint import ShardedCheckpointIO
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.sections.run import BestCheckpointsConfig, CheckpointConfig
from megarl.modules.base import Module
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.strategy import MegatronStrategy
from megarl.run.runner import resume_from
from tests.e2e.runs import launched

State = dict[str, torch.Tensor]


def checkpoint_io(asynchronous: bool = False) -> ShardedCheckpointIO:
    """Checkpoint I/O over the current world, all of it data parallel."""
    device = start_world()
    io = ShardedCheckpointIO(asynchronous)
    io.grid = Grid(Layout.for_world(dist.get_world_size()), device)
    return io


def sharded(tensors: State, replica: int) -> dict[str, Any]:
    """Tensors that every data-parallel rank holds, as an engine describes them."""
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, 0, replica)) for key, tensor in tensors.items()
    }


def save(io: ShardedCheckpointIO, path: Path, tensors: State, **common: Any) -> None:
    assert io.grid is not None
    state = {"policy": sharded(tensors, io.grid.dp_rank)}
    io.save_checkpoint({"global_step": 0, "layout": "any", **common, "state_dict": state}, path)


def load(io: ShardedCheckpointIO, path: Path, like: State | None = None) -> dict[str, Any]:
    """What the newest whole checkpoint at `path` holds besides tensors, and, with `like`, its tensors too."""
    assert io.grid is not None
    found = io.load_checkpoint(path)
    fill = found.pop("state_dict")
    if like is not None:
        found["tensors"] = fill({"policy": sharded(like, io.grid.dp_rank)})["policy"]
    return found


class TinyEngine:
    """Eight numbers; what `MegatronStrategy` needs of an engine."""

    name = "policy"
    optimizer = None
    saved = True

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.weight = torch.zeros(8)

    def sharded_state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        return sharded({"policy.weight": self.weight}, self.grid.dp_rank)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["policy.weight"])


class TinyModule(Module):
    """Every step mixes into the weight numbers that depend on the data cursor and on every rank's generator."""

    def __init__(self, evals: Mapping[int, float], each_step: Callable[[int], None]) -> None:
        super().__init__()
        self.evals, self.each_step = evals, each_step

    def configure_model(self) -> None:
        if not self.engines:
            self.engines = {"policy": TinyEngine(self.grid)}  # type: ignore[dict-item]

    def train_dataloader(self) -> "Cursor":
        return Cursor(self.steps_done)

    def val_dataloader(self) -> "Cursor":
        return Cursor(0, end=1)

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.each_step(self.trainer.global_step)
        weight = self.engines["policy"].weight  # type: ignore[attr-defined]
        weight.mul_(0.9).add_(self.grid.sum_over_data(torch.rand(8)) * (1 + batch))
        self.step_optimizers()
        self.steps_done += 1

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Scores are scripted."""

    def on_validation_epoch_end(self) -> None:
        self.log("eval/loss", self.evals[self.trainer.global_step])


class Cursor:
    """The numbers from `start` on."""

    def __init__(self, start: int, end: int = 10_000) -> None:
        self.start, self.end = start, end

    def __len__(self) -> int:
        return self.end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))


def run_tiny(
    run_dir: Path,
    steps: int,
    *,
    evals: Mapping[int, float] | None = None,
    eval_every: int | None = None,
    resume: str = "auto",
    each_step: Callable[[int], None] = lambda step: None,
    more_callbacks: Callable[[Checkpoints], list[Callback]] = lambda checkpoints: [],
    best: Mapping[str, Any] | None = None,
    **checkpoint: Any,
) -> dict[str, Any]:
    """Train in the current world up to `steps`; the weight, the step reached and the best checkpoint's name."""
    ranking = None if best is None else BestCheckpointsConfig(**best)
    config = CheckpointConfig(**{"every": 1, "best": ranking, **checkpoint})
    checkpoints = Checkpoints(run_dir / "checkpoints", config, eval_every)
    module = TinyModule({} if evals is None else evals, each_step)
    with launched():
        trainer = Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=MegatronStrategy(ParallelConfig(), seed=1, checkpoint_io=ShardedCheckpointIO(config.async_save)),
            callbacks=[checkpoints, *more_callbacks(checkpoints)],
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=eval_every,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if eval_every else 0,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run_dir,
        )
        trainer.fit(module, ckpt_path=resume_from(resume, run_dir))
    best = checkpoints.best()
    return {
        "weight": module.engines["policy"].weight,  # type: ignore[attr-defined]
        "step": trainer.global_step,
        "best": best.name if best else None,
        "consumed": module.steps_done,
    }
