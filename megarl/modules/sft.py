"""Supervised fine-tuning: cross entropy on the response tokens of each record."""

import math
from collections.abc import Iterable

from torch import Tensor

from megarl.clock import Work
from megarl.config.cluster import PlanConfig
from megarl.config.sft import SFTConfig
from megarl.data.agreement import refuse_different_data
from megarl.data.build import build_sft_data, build_train_loader
from megarl.data.order import EvalLoader
from megarl.experience.rows import training_flops
from megarl.models.exchange.pretrained import Sources, adapters
from megarl.models.flops import flops_per_token
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.modules.base import Module
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.workload import Workload, sequences
from megarl.parallel.engine import Stats
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows, RowSource
from megarl.parallel.shards import refused_once


class SFT(Module):
    """Supervised fine-tuning. One training step is one optimizer step over a global batch of records."""

    config: SFTConfig

    def prepare(self) -> None:
        """Start the sums of the evaluation loss at zero."""
        self.eval_sums = {"nll": 0.0, "tokens": 0.0}

    @staticmethod
    def roles(config: SFTConfig, vocab_size: int, sources: Sources) -> list[Role]:
        """Return one model, the policy."""
        source = sources.at(config.model.path)
        own = adapters(config, sources, config.model)
        return [Role("policy", config.model, vocab_size, optim=config.optim, source=source, about="trains", **own)]

    @staticmethod
    def plan(config: SFTConfig, assumed: PlanConfig) -> Workload:
        """Return the size of an optimizer step."""
        return Workload(**sequences(config, assumed))

    def configure_model(self) -> None:
        """Read the data sets and build the policy."""
        if self.engines:
            return
        self.train_data, self.eval_data = refused_once(
            self.grid, lambda: build_sft_data(self.config, self.tokenizer, report=self.grid.dp_rank == 0)
        )
        for data, name in ((self.train_data, "data.train"), (self.eval_data, "data.eval")):
            if data is not None:
                refuse_different_data(self.grid, data.token_rows(), name)
        (policy,) = self.roles(self.config, self.vocab_size, self.sources)
        self.policy = self.build(policy, self.config.trainer.max_steps)
        self.engines = {"policy": self.policy}

    @property
    def rows_per_step(self) -> int:
        """Number of data rows in a global batch."""
        return self.config.trainer.global_batch_size

    @property
    def rows_there(self) -> int:
        """Number of rows of the training data."""
        return len(self.train_data)

    def train_dataloader(self) -> Iterable[Tensor]:
        """Return the loader of row indices, from the first row that the run did not use yet."""
        return build_train_loader(self.config, self.train_data, start=self.steps_done, rows=self.rows_read)

    def val_dataloader(self) -> Iterable[Tensor]:
        """Return the loader of evaluation rows, one microbatch per pipeline stage and replica in each step."""
        if self.eval_data is None:
            return []
        per_step = self.config.trainer.eval_batch_size * self.grid.layout.pp * self.grid.layout.dp
        return EvalLoader(len(self.eval_data), per_step)

    def _microbatches(self, data: RowSource, indices: Tensor, per_microbatch: int) -> list[Microbatch]:
        return make_microbatches(
            data,
            indices,
            self.policy,
            per_microbatch=per_microbatch,
            share_bins=self.config.data.pack and self.policy.has_encoder,  # other models' rows are packed already
            longest=self.config.data.seq_length - 1,  # the last token is a target only
        )

    def training_step(self, indices: Tensor, batch_idx: int) -> None:
        """Take one optimizer step on the rows and log its loss."""
        with self.clock.part("train"):
            rate = self.policy.learning_rate
            metrics = self.gradients(self.train_data, indices)
            norms = self.step_optimizers()
        self.advance()
        self.work = self._work(metrics, indices)
        self.log_dict({"train/loss": metrics["loss"], "train/grad_norm": norms["policy"], "train/lr": rate})
        self.log_dict(self.policy.observed)

    def _work(self, metrics: dict[str, float], indices: Tensor) -> Work:
        tokens, adapter = int(metrics["all_tokens"]), self.policy.config.adapter
        if self.policy.has_encoder:
            rows = self.rows_at(indices)
            sizes = (self.config.model, self.vocab_size, rows.lengths, adapter, rows.prompts)
            return Work(tokens, training_flops(*sizes))
        length = metrics["squared_lengths"] / max(tokens, 1)  # token-weighted mean: attention's cost
        return Work(tokens, tokens * flops_per_token(self.config.model, self.vocab_size, length, adapter))

    def gradients(self, rows: RowSource, indices: Tensor) -> dict[str, float]:
        """Compute the gradients of the cross entropy over the rows at these indices."""
        self.last_batch = self._microbatches(rows, indices, self.config.trainer.micro_batch_size)
        return self.policy.train_step(self.last_batch, cross_entropy, count)

    def rows_at(self, indices: Tensor) -> Rows:
        """Return rows of the training data."""
        return self.train_data.take(indices)

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of the evaluation loss."""
        self.eval_sums = {"nll": 0.0, "tokens": 0.0}

    def validation_step(self, indices: Tensor, batch_idx: int) -> None:
        """Add the loss of these rows to the sums."""
        assert self.eval_data is not None
        with self.clock.part("eval"):
            microbatches = self._microbatches(self.eval_data, indices, self.config.trainer.eval_batch_size)
            sums = self.policy.evaluate(microbatches, negative_log_likelihood)
        self.eval_sums = {key: self.eval_sums[key] + sums[key] for key in self.eval_sums}

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss and the perplexity."""
        loss = self.eval_sums["nll"] / max(self.eval_sums["tokens"], 1.0)
        self.log_dict({"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 100.0))})


def negative_log_likelihood(model: GPT, hidden: Tensor, batch: Microbatch) -> Stats:
    """Return the summed negative log-likelihood of a microbatch's target tokens, and the number of these tokens."""
    logprobs = model.logprobs(hidden, batch.targets, batch.target_mask).logprobs
    return {"nll": -(logprobs.double() * batch.target_mask).sum(), "tokens": batch.target_mask.sum()}


def count(batch: Microbatch) -> Stats:
    """Return the numbers of target tokens and of all tokens without padding, and the sum of the squared row lengths."""
    lengths = batch.rows.lengths
    return {
        **count_targets(batch),
        "all_tokens": lengths.sum(),
        "squared_lengths": (lengths.double() ** 2).sum(),
    }
