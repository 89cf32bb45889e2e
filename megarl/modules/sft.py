"""Supervised fine-tuning: cross entropy on the response tokens of each record."""

import math
from collections.abc import Iterable

from torch import Tensor

from megarl.algorithms import aggregate
from megarl.clock import Work
from megarl.config.files import load_chat_template
from megarl.config.schema import SFTConfig
from megarl.data.build import build_eval_loader, build_sft_data, build_train_loader
from megarl.models.exchange.card import ModelCard
from megarl.models.flops import flops_per_token
from megarl.models.gpt import GPT
from megarl.modules.base import Module, build_gpt_engine, vocabulary
from megarl.parallel.engine import Batch, Stats
from megarl.parallel.shards import refused_once
from megarl.tokenizers import Tokenizer


class SFT(Module):
    """One training step is one optimizer step over a global batch of records."""

    entry = "sft"
    config: SFTConfig

    def __init__(self, config: SFTConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vocab_size = vocabulary(config.model, tokenizer)
        template = load_chat_template(config.data.chat_template)
        self.card = ModelCard.of(config.model, self.vocab_size, tokenizer, config.tokenizer, template)
        self.eval_sums = {"nll": 0.0, "tokens": 0.0}

    def configure_model(self) -> None:
        if self.engines:
            return
        layout = self.grid.layout
        self.share = {
            "dp_rank": self.grid.dp_rank,
            "dp_size": layout.dp,
            "multiple_of": layout.tp if layout.sequence_parallel else 1,
        }
        self.train_data, self.eval_data = refused_once(
            self.grid, lambda: build_sft_data(self.config, self.tokenizer, **self.share)
        )
        self.policy = build_gpt_engine(
            self.grid,
            self.config.model,
            self.config.parallel,
            name="policy",
            vocab_size=self.vocab_size,
            precision=self.config.trainer.precision,
            seed=self.config.seed,
            optim=self.config.optim,
            total_steps=self.config.trainer.max_steps,
        )
        self.engines = {"policy": self.policy}

    @property
    def rows_per_step(self) -> int:
        return self.config.trainer.global_batch_size

    def train_dataloader(self) -> Iterable[list[Batch]]:
        return build_train_loader(
            self.config, self.train_data, self.tokenizer, start=self.consumed, rows=self.rows, **self.share
        )

    def val_dataloader(self) -> Iterable[list[Batch]]:
        return (
            []
            if self.eval_data is None
            else build_eval_loader(self.config, self.eval_data, self.tokenizer, **self.share)
        )

    def training_step(self, microbatches: list[Batch], batch_idx: int) -> None:
        self.last_batch = microbatches
        with self.clock.part("train"):
            rate = self.policy.learning_rate
            metrics = self.policy.train_step(microbatches, token_loss, count)
            norms = self.step_optimizers()
        self.advance()
        tokens = int(metrics["all_tokens"])
        length = metrics["squared_lengths"] / max(tokens, 1)  # the mean that attention's cost goes by
        self.work = Work(tokens, tokens * flops_per_token(self.config.model, self.vocab_size, length))
        self.log_dict({"train/loss": metrics["loss"], "train/grad_norm": norms["policy"], "train/lr": rate})

    def on_validation_epoch_start(self) -> None:
        self.eval_sums = {"nll": 0.0, "tokens": 0.0}

    def validation_step(self, microbatches: list[Batch], batch_idx: int) -> None:
        with self.clock.part("eval"):
            sums = self.policy.evaluate(microbatches, self.negative_log_likelihood)
        self.eval_sums = {key: self.eval_sums[key] + sums[key] for key in self.eval_sums}

    def negative_log_likelihood(self, model: GPT, hidden: Tensor, batch: Batch) -> Stats:
        mask = batch["response_mask"]
        logprobs = model.logprobs(hidden, batch["tokens"], mask).logprobs
        return {"nll": -(logprobs.double() * mask).sum(), "tokens": mask.sum()}

    def on_validation_epoch_end(self) -> None:
        loss = self.eval_sums["nll"] / max(self.eval_sums["tokens"], 1.0)
        self.log_dict({"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 100.0))})


def token_loss(model: GPT, hidden: Tensor, batch: Batch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
    """Cross entropy, the mean over the response tokens of the global batch."""
    mask = batch["response_mask"]
    logprobs = model.logprobs(hidden, batch["tokens"], mask).logprobs
    loss = aggregate(-logprobs, mask, "token_mean", denominator=counts["tokens"])
    return loss, {"loss": loss}


def count(batch: Batch) -> Stats:
    """What is counted over a global batch: response tokens, tokens without padding, and squares of rows' lengths."""
    lengths = batch["lengths"]
    return {
        "tokens": batch["response_mask"].sum(),
        "all_tokens": lengths.sum(),
        "squared_lengths": (lengths.double() ** 2).sum(),
    }
