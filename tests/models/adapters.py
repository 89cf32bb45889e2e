"""Small engines with adapters, from a stored model or from random weights, in the current world."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.logits import inputs_of
from megarl.models.exchange.pretrained import Sources, adapters, resolve_adapter
from megarl.models.roles import Role
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.initialise import is_sharded, local_slice, partition_dim
from megarl.parallel.layout import Layout

VOCAB = 101
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48, "max_positions": 64}
OPTIMIZER = {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0}


@dataclass
class Tree:
    """The sections of a run's configuration that describe its adapters."""

    adapter: AdapterConfig | None
    model: ModelConfig


def world_grid(**layout: Any) -> Grid:
    device = start_world()
    return Grid(Layout.for_world(dist.get_world_size(), **layout), device)


def adapted_engine(
    grid: Grid,
    adapter: AdapterConfig | None,
    model: dict[str, Any] | None = None,
    path: Path | None = None,
    **options: Any,
) -> Engine:
    """An engine with the adapters of some settings, beside the model at a path or one made from a seed.

    `options`: heads, name, base (an engine whose frozen weights it uses), optim (keys of the optimizer), precision,
    recompute, seed.
    """
    sources = Sources()
    if path is None:
        shape, vocab_size = ModelConfig(**{**SHAPE, **(model or {})}), VOCAB
    else:
        source = open_source(path)
        shape, vocab_size = replace(source.model, path=str(path), **(model or {})), source.vocab_size
    config = Tree(adapter, shape)
    if adapter is not None:
        config = resolve_adapter(config, sources)
        shape = config.model
    base = options.get("base")
    role = Role(
        options.get("name", "policy"),
        shape,
        vocab_size,
        options.get("heads", ("lm",)),
        optim=OptimConfig(**{**OPTIMIZER, **options.get("optim", {})}),
        source=sources.at(shape.path),
        base=None if base is None else base.name,
        **adapters(config, sources, shape),
    )
    return build_engine(
        role,
        grid,
        ParallelConfig(recompute=options.get("recompute", "none")),
        precision=options.get("precision", "fp32"),
        seed=options.get("seed", 1),
        total_steps=20,
        base=base,
    )


@torch.no_grad()
def stir(engine: Engine, seed: int = 3) -> None:
    """Give all trainable tensors values that change what the model computes: the same in every layout."""
    tp = engine.grid.layout.tp
    for name, parameter in engine.parameters():
        if not parameter.requires_grad:
            continue
        shape = list(parameter.shape)
        if is_sharded(parameter):
            shape[partition_dim(parameter)] *= tp
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))  # hash(name) differs between processes
        noise = local_slice(torch.randn(shape, generator=generator), parameter, engine.grid.tp_rank, tp)
        if name.endswith(".magnitude"):
            parameter.mul_(1 + 0.1 * noise.tanh())
        else:
            parameter.copy_(0.1 * noise)
    assert engine.optimizer is not None
    engine.optimizer.reload_model_params()


@torch.no_grad()
def logits(engine: Engine, tokens: Tensor) -> Tensor:
    """Logits [rows, time, vocabulary] of an engine without parallelism; the scores [rows, time] of a reward model.

    The encoder of an encoder-decoder reads the first half of each row; the logits are those that predict the other.
    """
    (gpt,) = engine.models
    gpt.eval()
    hidden = gpt(inputs_of(engine.config, tokens))
    if "score" in gpt.heads:
        scores: Tensor = gpt.scores(hidden)
        return scores
    found: Tensor = gpt.logits(hidden.transpose(0, 1).flatten(0, 1))
    return found.reshape(len(tokens), len(hidden), -1)
