"""A digest of a model's weights that is the same in every layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megarl.parallel.engine import Engine
from megarl.parallel.shards import Part, collect

# Odd constants with well-mixed bits; products wrap around at 2**64.
_OF_POSITION, _OF_VALUE = -7046029254386353131, -4417276706812531889
_MOST = 2**22  # elements at a time


def weights_digest(engine: Engine) -> str:
    """Return a digest of all weights of an engine, on every rank.

    Every rank adds up its shards' elements, each multiplied by a function of its position in the whole tensor. The sums
    do not depend on how the tensors are split.
    """
    parts, _ = collect({"model": engine.sharded_weights()}, engine.grid, "")
    mine: dict[str, int] = {}
    for part, tensor in parts:
        name = part.key.removeprefix(f"{engine.name}.")
        mine[name] = mine.get(name, 0) + _sum(part, tensor)
    whole: dict[str, int] = {}
    for found in engine.grid.gather(mine):
        for name, value in found.items():
            whole[name] = (whole.get(name, 0) + value) % 2**64
    return hashlib.sha256(repr(sorted(whole.items())).encode()).hexdigest()


def _sum(part: Part, tensor: Tensor) -> int:
    """Return the sum of a shard's elements, weighted by their positions in the whole tensor."""
    shard = tensor.detach().contiguous()
    bits = shard.view(torch.int16 if shard.element_size() == 2 else torch.int32).flatten()
    strides = [1]
    for size in reversed(part.tensor_shape[1:]):
        strides.insert(0, strides[0] * size)
    total = 0
    for begin in range(0, len(bits), _MOST):
        local = torch.arange(begin, min(begin + _MOST, len(bits)), device=bits.device)
        position, rest = torch.zeros_like(local), local
        for size, offset, stride in zip(reversed(shard.shape), reversed(part.offset), reversed(strides), strict=True):
            position += (rest % size + offset) * stride
            rest = rest // size
        values = bits[begin : begin + _MOST].long() * _OF_VALUE
        mixed = (values ^ (values >> 29)) * (position * _OF_POSITION | 1)
        total += int(mixed.sum())
    return total % 2**64
