"""Float32 tensors as 8-bit codes with a scale per block (Dettmers et al., arXiv 2110.02861), exact on a second pass.

A block of values is divided by its largest magnitude, its `absmax`, and every quotient is replaced by the index of the
nearest value of a code map. The maps are the paper's dynamic ones: as many values per decade as a decade's share of the
codes, so that relative errors are small over six decades. They deviate in two things. They contain 1 (and -1) exactly,
so that a block's absmax is one of its decoded values: encoding what was decoded gives the same codes and the same
absmax. And in the map of unsigned values only 0 is encoded as 0, because AdamW divides by their roots.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share an absmax
TINY = 1e-30  # blocks below are stored as zeros: products of their absmax with a code would not be normal numbers


@dataclass(frozen=True)
class CodeMap:
    """Values between -1 (or 0) and 1, ascending, and the 254 bounds between them."""

    values: Tensor
    bounds: Tensor
    zero: int
    _on: dict[torch.device, "CodeMap"] = field(default_factory=dict)

    def to(self, device: torch.device) -> "CodeMap":
        """Return the map on a device."""
        if device not in self._on:
            self._on[device] = CodeMap(self.values.to(device), self.bounds.to(device), self.zero)
        return self._on[device]


def _decades(lowest: int) -> Tensor:
    """Return the values of seven decades, up to 1: `lowest` in the first, and twice as many in each that follows."""
    parts = [
        torch.linspace(0.1, 1.0, lowest * 2**decade + 1, dtype=torch.float64, device="cpu")[1:] * 10.0 ** (decade - 6)
        for decade in range(7)
    ]
    return torch.cat(parts)


def _signed() -> CodeMap:
    magnitudes = _decades(1)
    values = torch.cat([-magnitudes.flip(0), magnitudes.new_zeros(1), magnitudes])
    return CodeMap(values.float(), ((values[1:] + values[:-1]) / 2).float(), len(magnitudes))


def _unsigned() -> CodeMap:
    magnitudes = _decades(2)
    between = (magnitudes[1:] + magnitudes[:-1]) / 2
    zero = magnitudes.new_zeros(1)
    return CodeMap(torch.cat([zero, magnitudes]).float(), torch.cat([zero, between]).float(), 0)


SIGNED, UNSIGNED = _signed(), _unsigned()


def blocks_of(count: int) -> int:
    """Return the number of blocks of so many values; the last may be shorter."""
    return -(-count // BLOCK)


def encode(values: Tensor, codes: CodeMap) -> tuple[Tensor, Tensor]:
    """Return the codes [n] (uint8) of values [n], and the absmax of each block [blocks]."""
    codes = codes.to(values.device)
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    absmax = torch.where(absmax < TINY, 0.0, absmax)
    scaled = torch.where(absmax[:, None] == 0, 0.0, blocks / absmax[:, None])
    found = torch.bucketize(scaled, codes.bounds, out_int32=True).to(torch.uint8)
    return found.view(-1)[: len(values)], absmax


def decode(found: Tensor, absmax: Tensor, codes: CodeMap) -> Tensor:
    """Return the values [n] of codes [n] and of absmax [blocks]."""
    values = codes.to(found.device).values.index_select(0, found.int())
    return values.mul_(absmax.repeat_interleave(BLOCK)[: len(found)])
