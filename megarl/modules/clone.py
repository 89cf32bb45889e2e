"""Behaviour cloning before reinforcement learning: the policy starts where samples of the task are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megarl.config.ppo import PPOConfig
from megarl.config.rft import RFTConfig
from megarl.data.agreement import refuse_different_data
from megarl.data.dataset import SFTDataset
from megarl.data.order import TrainBatches, TrainLoader
from megarl.data.prompts import prompt_format
from megarl.data.sources import read_records
from megarl.logging import get_logger
from megarl.models.build import build_engine
from megarl.models.exchange.pretrained import Sources, adapters
from megarl.models.roles import Role
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.shards import refused_once
from megarl.progress import waiting
from megarl.tokenizers import Tokenizer

REPORTS = 8  # lines of progress
log = get_logger(__name__)


def clones(config: PPOConfig | RFTConfig) -> bool:
    """Whether a run begins with behaviour cloning."""
    return config.clone is not None and bool(config.clone.data)


def clone_behaviour(
    config: PPOConfig | RFTConfig,
    tokenizer: Tokenizer,
    grid: Grid,
    vocab_size: int,
    engines: Sequence[Engine],
    sources: Sources,
) -> None:
    """Train a model of the policy's shape on samples by cross entropy, and give its weights to the engines."""
    assert config.clone is not None
    clone, steps = config.clone, config.clone.steps
    settings = replace(config.optim, lr=clone.lr, schedule="constant", warmup_steps=0)
    source = sources.at(config.model.path)
    student = build_engine(
        Role(
            *("clone", config.model, vocab_size),
            optim=settings,
            lr_key="clone.lr",
            source=source,
            **adapters(config, sources, config.model),
        ),
        grid,
        config.parallel,
        precision=config.trainer.precision,
        seed=config.seed,
        total_steps=steps,
    )
    how, length = prompt_format(config.data), config.model.max_positions
    records = read_records(clone.data, config.data.train_split, key="clone.data", options=config.data.options)
    documents = refused_once(grid, lambda: SFTDataset(records, tokenizer, length, how, name="clone.data"))
    refuse_different_data(grid, documents.token_rows(), "clone.data")
    documents.stats.report("clone.data", "the model's context")
    log.info("cloning the behaviour of %d samples first: %d steps of cross entropy", len(documents), steps)
    order = TrainBatches(documents.lengths, config.trainer.global_batch_size, config.seed)
    micro = config.trainer.micro_batch_size
    with waiting("cloning behaviour", steps) as step_done:
        for step, indices in enumerate(TrainLoader(order, steps)):
            microbatches = make_microbatches(documents, indices, student, per_microbatch=micro, share_bins=True)
            metrics = student.train_step(microbatches, cross_entropy, count_targets)
            student.apply_gradients()
            step_done()
            if (step + 1) % max(1, steps // REPORTS) == 0:
                log.info("cloning step %d/%d  loss %.4f", step + 1, steps, metrics["loss"])
    student.refuse_not_finite()
    for engine in engines:
        engine.start_from(student)
