"""Behaviour cloning before reinforcement learning: the policy starts where samples of the task are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from megarl.config.schema import PPOConfig
from megarl.data import RecordFormat, SFTDataset, StepLoader, TrainBatches, read_records
from megarl.data.prompts import RANDOMWALKS
from megarl.data.randomwalks import task
from megarl.data.sources import Record
from megarl.logging import get_logger
from megarl.modules.base import build_gpt_engine
from megarl.modules.sft import count, token_loss
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.tokenizers import Tokenizer

REPORTS = 8  # lines of progress
log = get_logger(__name__)


def clone_behaviour(
    config: PPOConfig, tokenizer: Tokenizer, grid: Grid, vocab_size: int, engines: Sequence[Engine]
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
    )
    for step, batch in enumerate(_batches(config, tokenizer, grid)):
        metrics = student.train_step(batch, token_loss, count)
        student.apply_gradients()
        if (step + 1) % max(1, steps // REPORTS) == 0:
            log.info("cloning step %d/%d  loss %.4f", step + 1, steps, metrics["loss"])
    for engine in engines:
        engine.start_from(student)


def _batches(config: PPOConfig, tokenizer: Tokenizer, grid: Grid) -> Iterable[list[Any]]:
    longest = config.model.max_positions
    samples = SFTDataset(_records(config), tokenizer, longest, RecordFormat(), name="clone.data")
    batches = TrainBatches(samples.lengths, config.trainer.global_batch_size, config.seed)
    return StepLoader(
        samples,
        batches,
        micro_batch_size=config.trainer.micro_batch_size,
        seq_length=longest,
        pad_id=tokenizer.pad_id,
        dp_rank=grid.dp_rank,
        dp_size=grid.layout.dp,
        multiple_of=grid.layout.tp if grid.layout.sequence_parallel else 1,
        steps=config.clone.steps,
    )


def _records(config: PPOConfig) -> Iterable[Record]:
    for path in config.clone.data:
        if path == RANDOMWALKS:
            graph = config.data.graph_seed
            yield from (Record({"text": walk}, f"randomwalks {graph}") for walk in task(graph).walks)
        else:
            yield from read_records([path], config.data.train_split)
