"""Whole tensors, gathered from the ranks that hold parts of them: parameters, and gradients that will be applied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, join_slices, partition_dim, partition_stride
from megarl.parallel.trained import Trained, trained_tensors

Copies = dict[str, list[Tensor]]
"""Whole tensors in host memory, in float32, by global name: one for each copy that the world holds."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """A span of this rank's slice of a tensor.

    Attributes:
        name: name of the tensor in the whole model.
        copy: what ranks share that hold parts of one copy.
        tp_rank: number of the slice.
        cut: dimension and stride of the slices; None if every tensor-parallel rank has the whole tensor.
        shape: shape of the slice.
        start: index in the flat slice of the first value.
        values: [n] float32, in numpy, which pickles much faster than torch.
    """

    name: str
    copy: tuple[int, ...]
    tp_rank: int
    cut: tuple[int, int] | None
    shape: tuple[int, ...]
    start: int
    values: np.ndarray


def whole_parameters(engine: Engine) -> Copies:
    """Return all copies of each parameter, on every rank. Replicas have one each, and so do the stages that share a
    tied embedding, and tensor-parallel ranks of a tensor that is not split."""
    grid = engine.grid
    replica = (grid.pp_rank, grid.dp_rank, int(grid.groups.cp.rank()))
    pieces = [
        _piece(name, parameter, parameter.detach().flatten(), 0, replica, grid)
        for name, parameter in engine.parameters()
    ]
    return _joined(pieces, grid)


def whole_gradients(engine: Engine) -> Copies:
    """Return the gradient of each trained parameter that the optimizer is about to apply, on every rank.

    Replicas share a copy: each has reduced the part of the gradient buffer that it updates.
    """
    optimizer = engine.optimizer
    assert optimizer is not None
    pieces = []
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            rank = part.data_parallel_group.rank()
            pieces += list(_reduced(trained_tensors(part, engine.chunks), rank, engine.grid))
    return _joined(pieces, engine.grid)


def whole_norm(tensors: Iterable[Sequence[Tensor]]) -> float:
    """Return the norm of all tensors together, of each its first copy."""
    return math.sqrt(sum(float(copies[0].double().square().sum()) for copies in tensors))


def _reduced(tensors: Iterable[Trained], rank: int, grid: Grid) -> Iterator[_Piece]:
    """Yield the parts of gradients that a rank of the data-parallel group has reduced."""
    for tensor in tensors:
        span = tensor.spans[rank]
        if span is not None:
            gradient: Any = tensor.parameter
            yield _piece(
                tensor.name,
                tensor.parameter,
                gradient.main_grad.flatten()[span],
                int(span.start),
                (grid.pp_rank,),
                grid,
            )


def _piece(name: str, like: Tensor, values: Tensor, start: int, copy: tuple[int, ...], grid: Grid) -> _Piece:
    split = grid.layout.tp > 1 and is_sharded(like)
    return _Piece(
        name,
        copy if split else (*copy, grid.tp_rank),
        grid.tp_rank,
        (partition_dim(like), partition_stride(like)) if split else None,
        tuple(like.shape),
        start,
        values.float().cpu().numpy(),
    )


def _joined(pieces: list[_Piece], grid: Grid) -> Copies:
    """Return the copies made of the pieces of all ranks."""
    by_copy: dict[tuple[str, tuple[int, ...]], list[_Piece]] = {}
    for piece in (piece for of_rank in grid.gather(pieces) for piece in of_rank):
        by_copy.setdefault((piece.name, piece.copy), []).append(piece)
    copies: Copies = {}
    for (name, _), parts in sorted(by_copy.items(), key=lambda item: item[0]):
        copies.setdefault(name, []).append(_whole(parts, grid.layout.tp))
    return copies


def _whole(parts: list[_Piece], tp: int) -> Tensor:
    """Return the tensor that parts of one copy make up. What no rank holds is NaN."""
    first = parts[0]
    slices = [_slice([part for part in parts if part.tp_rank == rank], first) for rank in range(tp)]
    if first.cut is None:
        return slices[first.tp_rank]
    cut: Any = SimpleNamespace(partition_dim=first.cut[0], partition_stride=first.cut[1])
    return join_slices(slices, cut)


def _slice(parts: Iterable[_Piece], like: _Piece) -> Tensor:
    flat = np.full(math.prod(like.shape), np.nan, dtype=np.float32)
    for part in parts:
        flat[part.start : part.start + len(part.values)] = part.values
    return torch.from_numpy(flat).view(like.shape)
