"""What every algorithm's module shares: its engines, the one optimizer over them, its cursor, its clock."""

from typing import Any

import torch
from lightning.pytorch import LightningModule

from megarl.clock import Clock, Work
from megarl.config.schema import ModelConfig, OptimConfig, ParallelConfig
from megarl.errors import ConfigError
from megarl.models.config import GPTConfig
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.load import load
from megarl.models.gpt import GPT, trains
from megarl.parallel.engine import Batch, Engine, OptimSpec
from megarl.parallel.grid import Grid
from megarl.parallel.optimizer import Optimizers
from megarl.tokenizers import Tokenizer


class Module(LightningModule):
    """A module whose models are engines over the strategy's grid. Subclasses fill `engines` in `configure_model`.

    `consumed` is the data cursor: how many training steps' worth of data has been used. It is what a resume needs to go
    on with the next record. `unit` is what such a step is called, `planned` how many there will be, where that is not
    the Trainer's to say. `samples` are rows of a table that the last evaluation filled.
    """

    unit = "step"
    planned: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.engines: dict[str, Engine] = {}
        self.consumed = 0
        self.clock = Clock()
        self.work = Work(tokens=0, flops=0.0)
        self.last_batch: list[Batch] = []
        self.samples: list[dict[str, Any]] = []
        self.baseline: dict[str, float] = {}  # metrics of an evaluation before the first step
        self.card: ModelCard | None = None  # says in a checkpoint what model it is of

    @property
    def grid(self) -> Grid:
        grid: Grid = self.trainer.strategy.grid  # type: ignore[attr-defined]
        return grid

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Optimizers(list(self.engines.values()))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay on the host: engines take what a pass needs."""
        return batch

    def close(self) -> None:
        """Let go of what the module holds outside its engines."""

    def step_optimizers(self) -> dict[str, float]:
        """Move every engine that has gradients; its gradient norm by name. Lightning counts this as one step."""
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        norms: dict[str, float] = optimizer.optimizer.grad_norms  # type: ignore[union-attr]
        return norms

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["consumed"] = self.consumed
        checkpoint["clock"] = self.clock.state_dict()
        if self.card is not None:
            checkpoint["model"] = self.card.plain()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.consumed = checkpoint["consumed"]
        self.clock.load_state_dict(checkpoint["clock"])


def vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Entries of the model's vocabulary: at least the tokenizer's."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer, which has {tokenizer.size} entries: "
            f"use model.vocab_size={tokenizer.size} or more, null for the tokenizer's size, or another tokenizer"
        )
    return model.vocab_size or tokenizer.size


def build_gpt_engine(
    grid: Grid,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    name: str,
    vocab_size: int,
    precision: str,
    seed: int,
    optim: OptimConfig | None = None,
    total_steps: int = 0,
    value_head: bool = False,
    q_heads: int = 0,
    speaks: bool = True,
) -> Engine:
    """A GPT in a role, with the weights of `model.path`, or random ones that are the same in every layout."""
    source = open_source(model.path) if model.path else None
    config = GPTConfig.build(
        model,
        grid.layout,
        vocab_size=vocab_size,
        precision=precision,
        recompute=parallel.recompute,
        kernels=parallel.kernels,
    )

    def build(*, pre_process: bool, post_process: bool, vp_stage: int | None) -> GPT:
        gpt = GPT(
            config,
            grid,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            value_head=value_head,
            q_heads=q_heads,
        )
        gpt.initialise(grid, seed, loaded=source.names if source else ())
        if source is not None:
            load(gpt, source, grid)
        return gpt

    return Engine(
        grid,
        build,
        name=name,
        optim=None if optim is None else OptimSpec(optim, total_steps),
        trainable=lambda parameter: trains(parameter, model.num_layers, model.num_layers_unfrozen, speaks=speaks),
    )
