"""The base class of algorithms whose optimizer steps are over responses that a data set holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megarl.clock import Work
from megarl.data.agreement import refuse_different_data
from megarl.data.order import EvalLoader, TrainBatches, TrainLoader
from megarl.data.pairs import ResponseData, build_preference_data
from megarl.experience.rows import forward_flops, training_flops
from megarl.models.gpt import GPT
from megarl.modules.base import Module
from megarl.parallel.engine import Stats
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows, RowSource
from megarl.parallel.shards import refused_once


class UnitModule(Module):
    """One training step is one optimizer step over a global batch of units: rows that are trained on together, such as
    the two of a pair. `trainer.global_batch_size` and `micro_batch_size` count units.

    A subclass defines `kind`, `measure`, `count` and `means`, and the names of its metrics.
    """

    training_metrics: tuple[str, ...] = ()
    """Names of the metrics of training steps; those that an algorithm does not have are left out."""
    read_last = False
    """Whether the model reads the last token of a row too."""
    has_output = True
    """Whether the model has an output layer over the vocabulary."""

    # --- what a subclass defines ------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """What each record is read as, a key of `data.pairs.READERS`."""
        raise NotImplementedError

    def measure(self, model: GPT, hidden: Tensor, batch: Microbatch) -> Stats:
        """Return sums over the units of a microbatch: unit_loss, which trains, and what metrics are made of."""
        raise NotImplementedError

    def count(self, batch: Microbatch) -> Stats:
        """Return the number of units of a microbatch, as "units", and what else `means` divides by."""
        raise NotImplementedError

    def total_loss(self, sums: Mapping[str, Any], counts: Mapping[str, float]) -> Any:
        """Return the loss from the sums of `measure`, given the counts of `count` over the global batch."""
        return sums["unit_loss"] / counts["units"]

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Return metrics from sums over a global batch or an evaluation."""
        raise NotImplementedError

    def before_step(self, rows: Rows) -> None:
        """Compute what the loss needs to know of the whole batch."""

    def with_models(self) -> None:
        """Prepare what needs the models, before a checkpoint is restored."""

    def rows_of(self, data: ResponseData, units: Tensor) -> Rows:
        """Return the rows of units, with all columns that the loss reads."""
        return data.take(units)

    # --- models and data --------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Read the data and build the models."""
        if self.engines:
            return
        self.train_data, self.eval_data = refused_once(
            self.grid,
            lambda: build_preference_data(self.config.data, self.tokenizer, self.kind, report=self.grid.dp_rank == 0),
        )
        for data, name in ((self.train_data, "data.train"), (self.eval_data, "data.eval")):
            if data is not None:
                refuse_different_data(self.grid, data.token_rows(), name, kept=data.digest())
        for role in self.roles(self.config, self.vocab_size, self.sources):
            self.engines[role.name] = self.build(role, self.config.trainer.max_steps)
        self.policy = self.engines["policy"]
        self.with_models()

    @property
    def rows_per_step(self) -> int:
        """Number of units in a global batch."""
        size: int = self.config.trainer.global_batch_size
        return size

    @property
    def rows_there(self) -> int:
        """Number of units of the training data."""
        return len(self.train_data.lengths)

    def batches(self, start: int = 0, rows: int | None = None) -> TrainBatches:
        """Return the global batches of the run from step `start`, before which `rows` units were used."""
        size, seed, shuffle = self.rows_per_step, self.config.seed, self.config.data.shuffle
        return TrainBatches(self.train_data.lengths, size, seed, shuffle=shuffle, start=start, rows=rows)

    def train_dataloader(self) -> Iterable[Tensor]:
        """Return the loader of unit indices, from the first unit that the run did not use yet."""
        return TrainLoader(self.batches(self.steps_done, self.rows_read), self.config.trainer.max_steps)

    def val_dataloader(self) -> Iterable[Tensor]:
        """Return the loader of evaluation units, one microbatch per pipeline stage and replica in each step."""
        if self.eval_data is None:
            return []
        per_step = self.config.trainer.eval_batch_size * self.grid.layout.pp * self.grid.layout.dp
        return EvalLoader(len(self.eval_data), per_step)

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, units: Tensor, batch_idx: int) -> None:
        """Take one optimizer step on the units and log its loss and what it measures."""
        with self.clock.part("train"):
            rows = self.rows_at(units)
            rate = self.policy.learning_rate
            metrics = self.gradients(rows, torch.arange(len(rows)))
            norms = self.step_optimizers()
        self.advance()
        model, vocab_size = self.config.model, self.vocab_size if self.has_output else 0
        lengths, prompts = rows.lengths, rows.prompts
        flops = training_flops(model, vocab_size, lengths, self.policy.config.adapter, prompts)
        others = len(self.engines) - 1  # which do not train
        flops += others * forward_flops(model, vocab_size, lengths, prompts=prompts)
        self.work = Work(int(rows.lengths.sum()), flops)
        self.log_dict(named(metrics, self.training_metrics))
        self.log_dict({"train/grad_norm": norms["policy"], "train/lr": rate, **self.policy.observed})

    def rows_at(self, indices: Tensor) -> Rows:
        """Return the rows of these units of the training data."""
        return self.rows_of(self.train_data, indices)

    def gradients(self, rows: RowSource, indices: Tensor) -> dict[str, float]:
        """Compute the gradients of the loss over the units that the rows at these indices belong to."""
        batch = rows.take(indices)
        self.before_step(batch)
        self.last_batch = self.microbatches(batch, self.config.trainer.micro_batch_size)
        sums = self.policy.train_step(self.last_batch, self._loss, self.count)
        return {"loss": sums["loss"], **self.means(sums)}

    def microbatches(self, rows: Rows, per_microbatch: int) -> list[Microbatch]:
        """Return this replica's microbatches of rows, with the rows of a unit in one bin."""
        return make_microbatches(
            rows,
            torch.arange(len(rows)),
            self.policy,
            per_microbatch=per_microbatch,
            share_bins=self.config.data.pack,
            keep_together=rows["unit"],
            read_last=self.read_last,
        )

    def _loss(self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
        sums = self.measure(model, hidden, batch)
        loss: Tensor = self.total_loss(sums, counts)
        return loss, {"loss": loss, **sums}


def named(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics that an algorithm has, under the names that are logged."""
    return {name: metrics[short] for name in names if (short := name.partition("/")[2]) in metrics}
