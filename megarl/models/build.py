"""Build engines from roles."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.errors import ConfigError
from megarl.models.config import GPTConfig
from megarl.models.exchange.load import load
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.parallel.engine import BuildModel, Engine, OptimSpec
from megarl.parallel.grid import Grid
from megarl.tokenizers import Tokenizer


def vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Return the size of the model's vocabulary: at least the tokenizer's."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer, which has {tokenizer.size} entries: "
            f"use model.vocab_size={tokenizer.size} or more, null for the tokenizer's size, or another tokenizer",
            key="model.vocab_size",
            value=model.vocab_size,
            offers={"model.vocab_size": [tokenizer.size, None]},
        )
    return model.vocab_size or tokenizer.size


def build_engine(
    role: Role, grid: Grid, parallel: ParallelConfig, *, precision: str, seed: int, total_steps: int = 0
) -> Engine:
    """Build a role's engine with the weights of its source, or random weights that are the same in every layout.

    Args:
        total_steps: optimizer steps of the whole run, for the learning-rate schedule of a trainable role.
    """
    config = GPTConfig.build(
        role.model,
        grid.layout,
        vocab_size=role.vocab_size,
        precision=precision,
        recompute=parallel.recompute,
        kernels=parallel.kernels,
    )
    source = role.source
    if source is None and role.model.path is not None:
        raise ValueError(f"role {role.name} starts from {role.model.path}, which is not open")
    empty = empty_model(config, grid, role.heads)

    def build(*, pre_process: bool, post_process: bool, vp_stage: int | None) -> GPT:
        gpt: GPT = empty(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        gpt.initialise(grid, seed, loaded=source.names if source else (), head_std=role.head_std)
        if source is not None:
            load(gpt, source, grid)
        return gpt

    return engine_of(role, grid, build, total_steps)


def empty_model(config: GPTConfig, grid: Grid, heads: Sequence[str]) -> BuildModel:
    """Return a function that builds a model's chunks with uninitialised weights."""

    def build(*, pre_process: bool, post_process: bool, vp_stage: int | None) -> GPT:
        return GPT(config, grid, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage, heads=heads)

    return build


def engine_of(role: Role, grid: Grid, build: BuildModel, total_steps: int) -> Engine:
    """Return the engine of a role, with the chunks that `build` builds."""
    optim = None if role.optim is None else OptimSpec(role.optim, total_steps, role.lr_key)
    return Engine(grid, build, name=role.name, optim=optim, trainable=role.is_trainable, saved=role.saved)
