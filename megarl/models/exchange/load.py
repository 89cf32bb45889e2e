"""From a stored model into the shards of one that was built: each rank keeps its part of one tensor after another."""

from typing import Any

import torch
from torch import Tensor, nn

from megarl.errors import CheckpointError
from megarl.models.exchange.parameters import EMBEDDING, OUTPUT, OUTPUT_BIAS, TRUNK
from megarl.models.exchange.source import Source
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, local_slice, partition_dim

VOCABULARY = (EMBEDDING, OUTPUT, OUTPUT_BIAS)


@torch.no_grad()
def load(chunk: Any, source: Source, grid: Grid) -> None:
    """Fill a chunk's parameters in place, before gradient buffers and optimizers are made from them.

    Heads that the source does not have keep their values. Host memory beyond the shards is that of one tensor.
    """
    held = source.names
    for name, parameter in chunk.global_names():
        if name in held:
            _fill(name, parameter, source.read(name), grid.tp_rank, grid.layout.tp)
        elif name.startswith(TRUNK):
            raise CheckpointError(f"{source.path} has no {name}: it is of another model")


def _fill(name: str, parameter: nn.Parameter, whole: Tensor, rank: int, tp: int) -> None:
    if name in VOCABULARY:
        rows = parameter.shape[0]  # of this rank, padding included
        mine = whole[rank * rows : (rank + 1) * rows]
        parameter.data[: len(mine)].copy_(mine)
        parameter.data[len(mine) :].zero_()
        return
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[partition_dim(parameter)] *= tp
    if list(whole.shape) != shape:
        raise CheckpointError(f"{name} is stored with shape {list(whole.shape)} and the model has {shape}")
    parameter.data.copy_(local_slice(whole, parameter, rank, tp))
