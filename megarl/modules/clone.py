"""Behaviour cloning before reinforcement learning: the policy starts where samples of the task are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megarl.algorithms import aggregate
from megarl.config.files import load_chat_template
from megarl.config.rl import PromptDataConfig
from megarl.config.schema import PPOConfig, RFTConfig
from megarl.data.collate import collate
from megarl.data.dataset import SFTDataset
from megarl.data.formats import RecordFormat
from megarl.data.order import TrainBatches
from megarl.data.randomwalks import RANDOMWALKS, task
from megarl.data.sources import Record, read_records
from megarl.logging import get_logger
from megarl.models.gpt import GPT
from megarl.modules.base import build_gpt_engine
from megarl.modules.experience import Passes, count_chosen
from megarl.parallel.engine import Batch, Engine, Stats
from megarl.parallel.grid import Grid
from megarl.parallel.shards import refused_once
from megarl.tokenizers import Tokenizer

REPORTS = 8  # lines of progress
log = get_logger(__name__)


def clone_behaviour(
    config: PPOConfig | RFTConfig, tokenizer: Tokenizer, grid: Grid, vocab_size: int, engines: Sequence[Engine]
) -> None:
    """Train a model of the policy's shape on samples by cross entropy, and give its weights to the engines."""
    clone, steps = config.clone, config.clone.steps
    settings = replace(config.optim, lr=clone.lr, schedule="constant", warmup_steps=0)
    student = build_gpt_engine(
        grid,
        config.model,
        config.parallel,
        name="clone",
        vocab_size=vocab_size,
        precision=config.trainer.precision,
        seed=config.seed,
        optim=settings,
        total_steps=steps,
        lr_key="clone.lr",
    )
    how, length = sample_format(config.data), config.model.max_positions
    documents = refused_once(grid, lambda: SFTDataset(_records(config), tokenizer, length, how, name="clone.data"))
    documents.stats.report("clone.data", "the model's context")
    samples = as_rows(documents)
    log.info("cloning the behaviour of %d samples first: %d steps of cross entropy", len(samples["tokens"]), steps)
    order = TrainBatches(samples["lengths"].numpy(), config.trainer.global_batch_size, config.seed)
    for step in range(steps):
        rows = torch.as_tensor(order.batch(step))
        passes = Passes(samples, rows, grid, config.trainer.micro_batch_size, share_slots=True)
        metrics = student.train_step(passes.microbatches(), clone_loss, count_chosen)
        student.apply_gradients()
        if (step + 1) % max(1, steps // REPORTS) == 0:
            log.info("cloning step %d/%d  loss %.4f", step + 1, steps, metrics["loss"])
    student.refuse_not_finite()
    for engine in engines:
        engine.start_from(student)


def sample_format(data: PromptDataConfig) -> RecordFormat:
    """How samples are read: by the keys and the chat template of the prompts that the policy will answer."""
    return RecordFormat(
        prompt_key=data.prompt_key,
        messages_key=data.messages_key,
        chat_template=load_chat_template(data.chat_template),
        settable=("messages_key", "prompt_key"),
    )


def as_rows(samples: SFTDataset) -> Batch:
    """tokens, response_mask [rows, time] and lengths [rows] of all samples."""
    batch = collate([samples.row(row) for row in range(len(samples))], int(samples.lengths.max()), pad_id=0)
    return {key: batch[key] for key in ("tokens", "response_mask", "lengths")}


def clone_loss(model: GPT, hidden: Tensor, batch: Batch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
    """Cross entropy, the mean over the trained tokens of the global batch."""
    logprobs = model.logprobs(hidden, batch["choices"], batch["chosen"]).logprobs
    loss = aggregate(-logprobs, batch["chosen"], "token_mean", denominator=counts["tokens"])
    return loss, {"loss": loss}


def _records(config: PPOConfig | RFTConfig) -> Iterable[Record]:
    for path in config.clone.data:
        if path == RANDOMWALKS:
            graph = config.data.graph_seed
            yield from (Record({"text": walk}, f"randomwalks {graph}") for walk in task(graph).walks)
        else:
            yield from read_records([path], config.data.train_split, key="clone.data")
