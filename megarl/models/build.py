"""Build engines from roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megarl.config.mixtures import refuse_quantised
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import quantised_linears
from megarl.models.config import GPTConfig
from megarl.models.exchange.adapters import StoredAdapter
from megarl.models.exchange.load import load, start_adapters
from megarl.models.experts import RouterStats
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.parallel.engine import BuildModel, Engine, OptimSpec
from megarl.parallel.grid import Grid
from megarl.tokenizers import Tokenizer


def vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Return the size of the model's vocabulary: at least the tokenizer's. Refuse a start token outside of it."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer, which has {tokenizer.size} entries: "
            f"use model.vocab_size={tokenizer.size} or more, null for the tokenizer's size, or another tokenizer",
            key="model.vocab_size",
            value=model.vocab_size,
            offers={"model.vocab_size": [tokenizer.size, None]},
        )
    size = model.vocab_size or tokenizer.size
    start = None if model.encoder is None else model.encoder.start_id
    if start is not None and start >= size:
        raise ConfigError(
            f"model.encoder.start_id={start} is not a token of the vocabulary, which has {size} entries: use "
            f"model.encoder.start_id={tokenizer.pad_id}, the tokenizer's padding, or another token below {size}",
            key="model.encoder.start_id",
            value=start,
            offers={"model.encoder.start_id": [tokenizer.pad_id, None]},
        )
    return size


def build_engine(
    role: Role,
    grid: Grid,
    parallel: ParallelConfig,
    *,
    precision: str,
    seed: int,
    total_steps: int = 0,
    base: Engine | None = None,
) -> Engine:
    """Build a role's engine with the weights of its source, or random weights that are the same in every layout.

    Args:
        total_steps: optimizer steps of the whole run, for the learning-rate schedule of a trainable role.
        base: the engine of `role.base`, whose frozen weights the new engine uses too.
    """
    refuse_quantised_experts(role)
    config = GPTConfig.build(
        role.model,
        grid.layout,
        vocab_size=role.vocab_size,
        precision=precision,
        recompute=parallel.recompute,
        kernels=parallel.kernels,
        adapter=role.adapter,
    )
    source = role.source
    if source is None and role.model.path is not None:
        raise ValueError(f"role {role.name} starts from {role.model.path}, which is not open")
    empty = empty_model(config, grid, role.heads)

    def build(*, pre_process: bool, post_process: bool, vp_stage: int | None) -> GPT:
        gpt: GPT = empty(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        stored = role.adapter_source
        shared = share_frozen(gpt, base.models, role.is_trainable) if base is not None else set()
        loaded = shared | (source.names if source else set()) | (stored.names if stored else set())
        gpt.initialise(grid, seed, loaded=loaded, head_std=role.head_std)
        if source is not None:
            load(gpt, source, grid, leave=shared)
        start_adapters(gpt, stored, grid)
        return gpt

    engine = engine_of(role, grid, build, total_steps)
    if config.experts is not None:
        engine.observer = RouterStats(engine.models, config, grid)
    if role.adapter_source is not None:
        _refuse_unplaced(engine, role.adapter_source, grid)
    return engine


def _refuse_unplaced(engine: Engine, stored: StoredAdapter, grid: Grid) -> None:
    """Raise on all ranks if a stored factor has no place in the model, or if a place has no stored factor."""
    here = {name for name, _ in engine.parameters() if ADAPTER in name}
    places = set().union(*grid.gather(here))
    factors = {name for name in stored.names if ADAPTER in name}
    for names, problem in ((factors - places, "has no place for"), (places - factors, "has places that lack")):
        if names:
            raise CheckpointError(
                f"adapter.path={stored.path}: this run {problem} {min(names)} ({len(names)} factors in all): use the "
                "model and the model.num_layers_unfrozen that it was trained with, or merge it first (python -m "
                "megarl.convert from=MODEL adapter=ADAPTER to=FOLDER)",
                key="adapter.path",
                value=str(stored.path),
                where=min(names),
            )


def share_frozen(gpt: GPT, others: Sequence[GPT], is_trainable: Callable[[str], bool]) -> set[str]:
    """Let a chunk's frozen parameters use the memory of another model's of the same name. Return their names."""
    theirs = {name: parameter for other in others for name, parameter in other.global_names()}
    shared = set()
    for name, parameter in gpt.global_names():
        if name in theirs and not is_trainable(name):
            parameter.data = theirs[name].data
            shared.add(name)
    stored = {name: linear for other in others for name, linear in quantised_linears(other)}
    for name, linear in quantised_linears(gpt):
        linear.quantised, linear.quantised_digest = stored[name].quantised, stored[name].quantised_digest
        shared.add(name)
    return shared


def empty_model(config: GPTConfig, grid: Grid, heads: Sequence[str]) -> BuildModel:
    """Return a function that builds a model's chunks with uninitialised weights."""

    def build(*, pre_process: bool, post_process: bool, vp_stage: int | None) -> GPT:
        return GPT(config, grid, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage, heads=heads)

    return build


def refuse_quantised_experts(role: Role) -> None:
    """Refuse adapters beside a base in fewer bits for a mixture of experts."""
    if role.model.experts is not None and role.adapter is not None:
        refuse_quantised(role.adapter.base_bits)


def engine_of(role: Role, grid: Grid, build: BuildModel, total_steps: int) -> Engine:
    """Return the engine of a role, with the chunks that `build` builds."""
    optim = None if role.optim is None else OptimSpec(role.optim, total_steps, role.lr_key)
    return Engine(grid, build, name=role.name, optim=optim, trainable=role.is_trainable, saved=role.saved)
