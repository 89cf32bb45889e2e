"""Small GPT engines for tests, alike in every layout."""

from typing import Any

import torch
import torch.distributed as dist

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.models.build import empty_model
from megarl.models.config import GPTConfig
from megarl.models.gpt import GPT
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine, OptimSpec
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows

VOCAB = 101


def small_engine(
    layout: dict[str, Any], model: dict[str, Any] | None = None, *, train: bool = True, **options: Any
) -> Engine:
    """A 4-layer GPT over the current world.

    `options`: precision, recompute, seed, trainable, value_head, q_heads, grid, optim (keys of the optimizer).
    """
    device = start_world()
    grid = options.get("grid") or Grid(Layout.for_world(dist.get_world_size(), **layout), device)
    shape = ModelConfig(**{"num_layers": 4, "hidden_size": 64, "max_positions": 64, **(model or {})})
    config = GPTConfig.build(
        shape,
        grid.layout,
        vocab_size=VOCAB,
        precision=options.get("precision", "fp32"),
        recompute=options.get("recompute", "none"),
    )

    heads = ("lm", *["value"] * bool(options.get("value_head")), *["q"] * options.get("q_heads", 0))
    empty = empty_model(config, grid, heads)

    def build(*, pre_process: bool, post_process: bool, vp_stage: int | None) -> GPT:
        gpt = empty(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        gpt.initialise(grid, options.get("seed", 1))
        return gpt

    settings = {"lr": 1e-3, "warmup_steps": 2, **options.get("optim", {})}
    spec = OptimSpec(OptimConfig(**settings), total_steps=20) if train else None
    return Engine(grid, build, optim=spec, trainable=options.get("trainable"))


def seeded_rows(step: int, rows: int = 8, time: int = 16) -> Rows:
    """Sequences of `time` tokens, the first half of each a prompt."""
    tokens = torch.randint(0, VOCAB, (rows, time), generator=torch.Generator().manual_seed(step))
    mask = torch.zeros(rows, time)
    mask[:, time // 2 :] = 1.0
    mask[::3, -2:] = 0.0  # rows of unequal length, so that local means are not the global one
    return Rows(tokens, torch.full((rows,), time), mask)


def batches(engine: Engine, step: int, rows: int = 8, time: int = 16, micro: int = 2) -> list[Microbatch]:
    """This replica's microbatches of a seeded global batch."""
    return make_microbatches(
        seeded_rows(step, rows, time), torch.arange(rows), engine, per_microbatch=micro, share_bins=False
    )


def few_batches(engine: Engine, step: int) -> list[Microbatch]:
    """As `batches`, two microbatches on each replica, or four where stages pass them on."""
    layout = engine.grid.layout
    return batches(engine, step, micro=2 if layout.pp > 1 else 4 // layout.dp)


def train(
    layout: dict[str, Any], steps: int, model: dict[str, Any] | None = None, **options: Any
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: what must be the same in every layout."""
    engine = small_engine(layout, model, **options)
    history = []
    for step in range(steps):
        metrics = engine.train_step(few_batches(engine, step), cross_entropy, count_targets)
        history.append((metrics["loss"], engine.apply_gradients()))
    return history
