"""Load a stored model into the shards of a built one: each rank keeps its slice of one tensor after another."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from megarl.disk import shown
from megarl.errors import CheckpointError, NumericsError
from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import adapted, quantised_linears
from megarl.models.adapters import fill as quantise_into
from megarl.models.exchange.adapters import StoredAdapter
from megarl.models.exchange.parameters import TRUNK, VOCABULARY
from megarl.models.exchange.source import Source
from megarl.models.heads import is_vocabulary_wide
from megarl.parallel.finite import is_finite
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import copy_slice, is_sharded, partition_dim
from megarl.parallel.shards import run_on_all_ranks
from megarl.progress import waiting


@torch.no_grad()
def load(chunk: Any, source: Source, grid: Grid, leave: Collection[str] = ()) -> None:
    """Fill a chunk's parameters in place, before gradient buffers and optimizers are made from them.

    Heads that the source lacks keep their values. Host memory beyond the shards is that of one tensor. All ranks call
    this together, and all raise if one of them fails.

    Args:
        chunk: a model's chunk.
        source: the stored model.
        grid: the grid that the chunk is built on.
        leave: names of parameters that have their values already.
    """
    held = source.names - set(leave)
    if "lm" in chunk.heads and not source.has_output:
        raise no_output_layer("model.path", str(source.path))

    parameters, quantised = list(chunk.global_names()), list(quantised_linears(chunk))

    def fill() -> None:
        with waiting(f"loading {source.path.name}", len(parameters) + len(quantised)) as tensor_done:
            for name, parameter in parameters:
                if name in held:
                    _fill(name, parameter, source, grid.tp_rank, grid.layout.tp)
                    _refuse_not_finite(name, parameter, source)
                elif name.startswith(TRUNK) and ADAPTER not in name and name not in leave:
                    raise CheckpointError(
                        f"{source.path} has no {name}: it belongs to another model", key=name, where=source.path
                    )
                tensor_done()

            for name, linear in quantised:
                if name not in held and name not in leave:
                    raise CheckpointError(
                        f"{source.path} has no {name}: it belongs to another model", key=name, where=source.path
                    )
                if name in held:
                    try:
                        quantise_into(linear, source.read(name))
                    except NumericsError as problem:
                        refused = problem.within(f"{source.path}: {name}")
                        refused.key = name
                        raise refused from None
                tensor_done()

    run_on_all_ranks(grid, fill)


def no_output_layer(key: str, path: str) -> CheckpointError:
    """Return the error for a reward model that is named as a language model."""
    return CheckpointError(
        f"{key}={shown(path)} is a reward model, which has no output layer: name a language model",
        key=key,
        value=path,
        where=path,
    )


def _refuse_not_finite(name: str, parameter: nn.Parameter, source: Source | StoredAdapter) -> None:
    """Raise if this rank's slice is not finite in the parameter's dtype, which may be narrower than the stored one."""
    if not is_finite(parameter.data):
        raise NumericsError(
            f"{source.path}: {name} holds NaN, infinity or values that {parameter.dtype} cannot hold: fetch the model "
            "again, or use an earlier checkpoint of its training",
            key=name,
            where=source.path,
        )


def _fill(name: str, parameter: nn.Parameter, source: Source | StoredAdapter, rank: int, tp: int) -> None:
    if name in VOCABULARY or is_vocabulary_wide(name):  # the largest tensors: only this rank's rows are read
        rows = parameter.shape[0]  # padding included
        mine = source.rows(name, rank * rows, (rank + 1) * rows)
        if mine.shape[1:] != parameter.shape[1:]:
            row = list(mine.shape[1:])
            raise CheckpointError(f"{name} is stored with rows of {row} and the model has others", key=name, value=row)
        parameter.data[: len(mine)].copy_(mine)
        parameter.data[len(mine) :].zero_()
        return
    whole = source.read(name)
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[partition_dim(parameter)] *= tp
    if list(whole.shape) != shape:
        found = list(whole.shape)
        raise CheckpointError(f"{name} is stored with shape {found} and the model has {shape}", key=name, value=found)
    copy_slice(whole, parameter, rank, tp)


@torch.no_grad()
def start_adapters(chunk: Any, stored: StoredAdapter | None, grid: Grid) -> None:
    """Fill a chunk's adapters and heads from a stored adapter; without one, set the lengths of rows, which follow from
    the weights. All ranks call this together."""
    held = set() if stored is None else stored.names

    def fill() -> None:
        assert stored is not None
        for name, parameter in chunk.global_names():
            if name in held:
                _fill(name, parameter, stored, grid.tp_rank, grid.layout.tp)
                _refuse_not_finite(name, parameter, stored)

    if stored is not None:
        run_on_all_ranks(grid, fill)
        return
    for linear in adapted([chunk]):
        linear.adapter.start(linear)
