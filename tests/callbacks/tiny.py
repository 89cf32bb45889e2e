"""The smallest run that has everything the callbacks look at: scripted losses, an evaluation, work, a clock."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger

from megarl.clock import Clock, Work
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import MicrobatchPlan
from megarl.parallel.rows import Microbatch, Rows


class Tiny(LightningModule):
    """Reports `losses[i]` at its i-th step and `evals[j]` at its j-th evaluation."""

    def __init__(self, losses: Sequence[float], evals: Sequence[float] = ()) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.losses, self.evals = losses, list(evals)
        self.clock = Clock()
        self.work = Work(tokens=0, flops=0.0)
        self.last_batch: list[Microbatch] = []
        self.in_step: Callable[[int], None] = lambda step: None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step
        rows = Rows(batch[:, None], torch.ones(1, dtype=torch.long), torch.zeros(1, 1)).with_columns(
            step=torch.tensor([step])
        )
        plan = MicrobatchPlan(rows.lengths, Layout(), 0, per_microbatch=1, share_bins=False)
        self.last_batch = plan.microbatches(rows)
        with self.clock.part("train"):
            self.in_step(step)
            self.optimizers().step()
        self.work = Work(tokens=100, flops=3e9)
        self.log_dict({"train/loss": self.losses[step], "train/grad_norm": 1.5, "train/lr": 0.5})

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        with self.clock.part("eval"):
            pass

    def on_validation_epoch_end(self) -> None:
        loss = self.evals.pop(0)
        self.log_dict({"eval/loss": loss, "eval/accuracy": 1 - loss / 10})

    def train_dataloader(self) -> Iterable[torch.Tensor]:
        return Batches(100)

    def val_dataloader(self) -> Iterable[torch.Tensor]:
        return Batches(1)


class Batches:
    """Batch i is the tensor [i]. (Lightning takes a plain list for a list of loaders.)"""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor([i]) for i in range(self.count))


def train(
    module: Tiny,
    callbacks: list[Callback],
    *,
    steps: int,
    log_every: int = 1,
    eval_every: int | None = None,
    logger: Sequence[Logger] = (),
    resume: Path | None = None,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=log_every,
        val_check_interval=eval_every,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if eval_every else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=list(logger),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=resume)
    return trainer


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Ticks:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def pass_(self, seconds: float) -> None:
        self.time += seconds
