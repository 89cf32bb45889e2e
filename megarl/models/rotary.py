"""Rotary position embedding from explicit positions, in the variants that published models use."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megarl.models.config import Rope


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each [time, batch, 1, rotary_dim]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(rope: Rope, dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """Return angular frequencies [dim / 2] in radians per position, and the factor of YaRN for cosine and sine."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    speeds = 1.0 / rope.base**exponents
    if rope.scaling == "linear":
        return speeds / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(speeds, rope), 1.0
    if rope.scaling == "yarn":
        return _yarn(speeds, rope, dim), 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return speeds, 1.0


def _llama3(speeds: Tensor, rope: Rope) -> Tensor:
    """Scale the frequencies as Llama 3.1 does: low ones are divided by the factor, high ones kept, others blended."""
    turns = float(rope.original_positions or 1) * speeds / (2 * math.pi)  # full turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * speeds + (1 - blend) * speeds / rope.factor


def _yarn(speeds: Tensor, rope: Rope, dim: int, fast_turns: float = 32.0, slow_turns: float = 1.0) -> Tensor:
    """Scale the frequencies as `_llama3` does, but blend linearly over their index (YaRN, Peng et al., 2023)."""
    original = float(rope.original_positions or 1)

    def index_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = max(math.floor(index_of(fast_turns)), 0), min(math.ceil(index_of(slow_turns)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=speeds.device)
    stretched = ((index - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return (1 - stretched) * speeds + stretched * speeds / rope.factor


def rotation(positions: Tensor, rope: Rope, dim: int, dtype: torch.dtype) -> Rotation:
    """Return the rotation for positions [batch, time], computed in float32 and then cast to `dtype`."""
    speeds, factor = inverse_frequencies(rope, dim, positions.device)
    angles = positions.t().float()[:, :, None] * speeds  # [time, batch, dim / 2]
    angles = angles.repeat_interleave(2, dim=-1) if rope.interleaved else torch.cat([angles, angles], dim=-1)
    return Rotation((angles.cos() * factor).to(dtype)[:, :, None], (angles.sin() * factor).to(dtype)[:, :, None])


def rotate(x: Tensor, turn: Rotation, interleaved: bool) -> Tensor:
    """Rotate the first rotary_dim channels of x [time, batch, heads, head_dim] and keep the rest."""
    dim = turn.cos.shape[-1]
    part, rest = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    if interleaved:
        pairs = part.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    part = part * turn.cos + turned * turn.sin
    return part if rest is None else torch.cat([part, rest], dim=-1)
