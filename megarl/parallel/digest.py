"""Exact checksums of tensors, alike in every layout: the checksums of a tensor's slices add up to its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, partition_dim, partition_stride
from megarl.parallel.shards import Part, collect

MODULUS = 2**64
"""Checksums are numbers below this, and are added modulo it."""

# Odd constants with well-mixed bits; products wrap around at 2**64.
_OF_POSITION, _OF_VALUE = -7046029254386353131, -4417276706812531889
# Elements at a time: on a CPU as many as stay in its cache, on a GPU as many as keep it busy.
_MOST_CPU, _MOST_GPU = 2**16, 2**22
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class HasWeights(Protocol):
    """What `weights_digest` reads of an engine."""

    name: str
    grid: Grid

    def sharded_weights(self) -> dict[str, Any]:
        """Return Megatron's description of this rank's weight shards."""


def digest(tensor: Tensor, tp_rank: int = 0, tp: int = 1) -> int:
    """Return the checksum of a tensor, or the summand of this rank's slice if Megatron split it over `tp` ranks.

    It is the sum over elements of mix(bits of the value) * odd(position in the whole tensor), modulo 2**64. Any change
    of one value changes it, as every factor is a bijection of 64-bit integers; so do, with near certainty, values that
    change places. Zeros add nothing, whatever their sign, so that the padding of a vocabulary has no effect.
    """
    return int(_of_slice(tensor, tp_rank, tp)) % MODULUS


def digests_of_copies(named: Iterable[tuple[str, Tensor]], grid: Grid) -> dict[str, list[int]]:
    """Return the checksums of whole tensors by global name, on every rank: one for each copy that the world holds.

    The summands of tensor-parallel slices are added. Each data-parallel replica has a copy, and so has each rank with a
    tensor that is not split, and each stage with a tied embedding. All ranks exchange one message.

    Args:
        named: this rank's tensors by global name: parameters, or buffers, which are copies on every rank.
        grid: the grid that the tensors are laid out on; it may be a `SecondGrid`.
    """
    tensors = dict(named)
    found = [_of_slice(tensor, grid.tp_rank, grid.layout.tp) for tensor in tensors.values()]
    sums = torch.stack(found).tolist() if found else []  # one transfer from the device
    sharded = [grid.layout.tp > 1 and is_sharded(tensor) for tensor in tensors.values()]
    slices_of = (grid.pp_rank, grid.dp_rank, grid.groups.cp.rank())  # ranks that share these hold slices of one copy
    copies: dict[str, dict[Any, int]] = {}
    for rank, (key, mine) in enumerate(grid.gather((slices_of, list(zip(tensors, sums, sharded, strict=True))))):
        for name, value, is_slice in mine:
            copy = key if is_slice else (*key, rank)
            of_name = copies.setdefault(name, {})
            of_name[copy] = (of_name.get(copy, 0) + value) % MODULUS
    return {name: list(of_name.values()) for name, of_name in copies.items()}


def weights_digest(engine: HasWeights) -> str:
    """Return one digest of all weights of an engine, on every rank: the names of stored references are made of it."""
    parts, _ = collect({"model": engine.sharded_weights()}, engine.grid, "")
    mine: dict[str, int] = {}
    for part, tensor in parts:
        name = part.key.removeprefix(f"{engine.name}.")
        mine[name] = mine.get(name, 0) + _of_part(part, tensor)
    whole: dict[str, int] = {}
    for found in engine.grid.gather(mine):
        for name, value in found.items():
            whole[name] = (whole.get(name, 0) + value) % MODULUS
    return hashlib.sha256(repr(sorted(whole.items())).encode()).hexdigest()


def _of_slice(tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
    """Return the sum over this rank's slice of a tensor, an int64 scalar on the tensor's device."""
    data = tensor.detach()
    shape = list(data.shape) or [1]
    index = [torch.arange(size, device=data.device) for size in shape]
    if tp > 1 and is_sharded(tensor):
        # The whole tensor is `stride` blocks, each split tp ways: see `local_slice`.
        axis, stride = partition_dim(tensor), partition_stride(tensor)
        size = shape[axis] // stride
        index[axis] = index[axis] + (index[axis] // size * (tp - 1) + tp_rank) * size
        shape[axis] *= tp
    return _sum(data, index, shape, signed_zeros=False)


def _of_part(part: Part, tensor: Tensor) -> int:
    """Return the sum over a rectangular slice. A negative zero counts, as it did when the first names were stored."""
    index = [
        torch.arange(size, device=tensor.device) + offset
        for size, offset in zip(tensor.shape, part.offset, strict=True)
    ]
    return int(_sum(tensor.detach(), index, part.tensor_shape, signed_zeros=True)) % MODULUS


def _sum(data: Tensor, index: Sequence[Tensor], whole: Sequence[int], *, signed_zeros: bool) -> Tensor:
    """Return the sum of a slice's elements, weighted by their positions in the whole tensor.

    Args:
        data: the slice.
        index: for each axis of the slice, the indices in the whole tensor.
        whole: shape of the whole tensor.
        signed_zeros: whether a negative zero differs from zero.
    """
    # A position is that of the row's first element plus that within the row; both are multiplied beforehand.
    inner = torch.zeros(1, dtype=torch.long, device=data.device)
    row = 1
    for axis, size in zip(index[1:], whole[1:], strict=True):
        inner = (inner[:, None] * size + axis).flatten()
        row *= size
    inner, outer = inner * _OF_POSITION, index[0] * row * _OF_POSITION
    bits = data.contiguous().view(_INTEGER[data.element_size()]).reshape(len(outer), len(inner))
    negative_zero = None if signed_zeros or not data.is_floating_point() else torch.iinfo(bits.dtype).min
    total = torch.zeros((), dtype=torch.long, device=data.device)
    step = max(1, (_MOST_CPU if data.device.type == "cpu" else _MOST_GPU) // max(1, len(inner)))
    for begin in range(0, len(outer), step):
        values = bits[begin : begin + step].to(torch.long, copy=True)  # not `long`, which copies no int64
        if negative_zero is not None:
            values.masked_fill_(values == negative_zero, 0)
        values.mul_(_OF_VALUE)
        values ^= values >> 29
        factor = (outer[begin : begin + step, None] + inner).bitwise_or_(1)
        total += values.mul_(factor).sum()
    return total
