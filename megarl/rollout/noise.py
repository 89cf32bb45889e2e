"""Random numbers that depend only on what they are used for: not on a generator's state, the order or the layout.

A number is a hash of (seed, stream, phase, prompt, sample, position, token). Every vocabulary shard therefore computes
its part of a row's noise, and a response is the same in any batch, slot or layout.
"""

from functools import lru_cache

import torch
from torch import Tensor

TRAINING, EVALUATION = 0, 1  # streams; further values of an evaluation's sweep use the next ones
GREEDY = 1 << 20  # stream of the greedy responses of training

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_CHUNK = 1 << 18  # numbers computed at once on a CPU, so that they stay in its cache


def mix64(value: int) -> int:
    """Apply a bijection of 64-bit numbers whose output bits each depend on every input bit (splitmix64's finaliser)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=4096)
def sequence_key(seed: int, stream: int, phase: int, prompt_id: int, sample_id: int) -> int:
    """Return 63 bits that identify one response."""
    key = 0
    for part in (seed, stream, phase, prompt_id, sample_id):
        key = mix64(mix64(key) ^ part)  # not symmetric: seed 1 in stream 0 differs from seed 0 in stream 1
    return key >> 1


def add_gumbel(scores: Tensor, keys: Tensor, positions: Tensor, start: int) -> Tensor:
    """Return `scores` plus standard Gumbel noise, float32.

    Args:
        scores: [rows, tokens] scores of the token ids from `start`.
        keys: [rows] int64 `sequence_key` of each row.
        positions: [rows] int64 position of the token to sample.
        start: first token id.
    """
    count, tokens = scores.shape
    row = _mix(keys + positions * 0x2545F4914F6CDD1D)
    low, high = row.to(torch.int32)[:, None], (row >> 32).to(torch.int32)[:, None]
    constants = _token_constants(start, tokens, scores.device)
    step = max(1, _CHUNK // max(1, tokens)) if scores.device.type == "cpu" else max(1, count)
    parts = [
        scores[i : i + step] - _log_exponential(low[i : i + step], high[i : i + step], constants)
        for i in range(0, count, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else scores


def _log_exponential(low: Tensor, high: Tensor, constants: Tensor) -> Tensor:
    """Return the logarithm [rows, tokens] of standard exponential noise, which is minus Gumbel noise.

    It uses 32-bit words throughout (half the memory traffic of 64): the token's word is mixed with both halves of the
    row's.
    """
    x = constants ^ low
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x += high
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975
    x ^= x >> 16  # no mask: the sign cancels, which leaves 31 even bits
    # Minus the distance of a uniform number from 1, so that large noise, which decides the sample, has fine resolution.
    distance = x.to(torch.float32).add_(0.5).mul_((2.0**-24 - 1) * 2.0**-31)
    return distance.log1p_().neg_().log_()


@lru_cache(maxsize=64)
def _token_constants(start: int, count: int, device: torch.device) -> Tensor:
    """Return a well-mixed 32-bit word [count] for each token id from `start`."""
    ids = torch.arange(start, start + count, device=device)
    return _mix((ids + 1) * -0x61C8864680B583EB).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of `mix64` to int64 tensors. Masks make the shifts logical; products wrap."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)
