"""Random numbers that depend on what they are for and on nothing else: no generator, no order, no layout.

A number is a hash of (seed, stream, phase, prompt, sample, position, token), so every vocabulary shard makes its own
part of a row's noise, and a response comes out the same in any batch, slot or layout.
"""

import torch
from torch import Tensor

TRAINING, EVALUATION = 0, 1  # streams

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """A bijection of 64-bit numbers whose output bits each depend on every input bit (splitmix64's finaliser)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sequence_key(seed: int, stream: int, phase: int, prompt_id: int, sample_id: int) -> int:
    """63 bits that stand for one response."""
    key = mix64(seed)
    for part in (stream, phase, prompt_id, sample_id):
        key = mix64(key ^ mix64(part))
    return key >> 1


def gumbel(keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise [rows, tokens], float32.

    keys: [rows] int64, of `sequence_key`; positions: [rows] int64, of the token to be drawn; tokens: [n] int64 ids.
    """
    row = _mix(keys + positions * 0x2545F4914F6CDD1D)
    bits = _mix(row[:, None] ^ (tokens * 0x9E3779B97F4A7C1)[None, :])
    # 32 bits as the distance from 1, so that large values, which decide the draw, are the finely resolved ones.
    distance = ((bits & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-distance.clamp_(max=1 - 2.0**-24)))


def _mix(x: Tensor) -> Tensor:
    """The same finaliser on int64 tensors; shifts are made logical by masking, products wrap."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)
