"""Storage of a frozen linear weight in 4 or 8 bits, cut by tensor parallelism without an effect on the numbers.

The matrix is quantised whole, and each rank keeps its slice of the result. bitsandbytes and torchao are not used
because their formats cut the flat tensor into blocks, so that a rank's slice would get other blocks in another layout.

4 bits: NF4 with double quantisation (QLoRA, https://arxiv.org/abs/2305.14314, section 3 and appendix E). 8 bits: 255
equal steps, with the same blocks and double quantisation. Where the width is a multiple of 64, the numbers are those
of bitsandbytes; otherwise each row's last block is short. Two deviations: the mean of double quantisation is exact,
because a float32 sum depends on the number of threads; and an absmax always gets its nearest code, where bitsandbytes'
CPU kernel rounds before it looks the code up and takes the neighbour for about 1 block in 1,000.

    a row       | 64 values | 64 values | 64 values | 20 |      codes: 4 or 8 bits a value
    blocks      |  absmax   |  absmax   |  absmax   | .. |      8 bits each: (absmax - offset) / scale of its group
    groups      256 blocks each, row after row of the whole matrix: one float32 scale each; one offset a matrix
    a rank      |              ^ its columns start within a block: it keeps that block's absmax too
"""

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megarl.errors import NumericsError
from megarl.parallel.products import add_product, linear_into

BLOCK = 64  # values that share an absmax
GROUP = 256  # blocks whose absmax share a scale
SMALLEST = 1e-38  # replaces the absmax of a block of zeros as a divisor
CPU_CHUNK, GPU_CHUNK = 2**20, 2**24  # values that are dequantised at once
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class QuantisedWeight(nn.Module):
    """A frozen matrix in 4 or 8 bits: this rank's slice [rows, columns] of a matrix that was quantised whole.

    Buffers are not part of the state dict, because the weight is loaded from the base model. Floats are kept as the
    bits of integers, because `module.bfloat16()` converts every buffer of floats.

    Attributes:
        codes: [rows, columns] in 8 bits, or [rows, columns / 2 rounded up] with two 4-bit codes a byte, the first high.
        absmax: 8-bit codes [rows, blocks] of the absmax of each block of which this rank has a value.
        scales: float32 bits [groups + 1] of the whole matrix: the scale of each group of absmax, then the offset.
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bits: int,
        dtype: torch.dtype,
        device: torch.device | str,
        partition_dim: int | None = None,
        stride: int = 1,
        rank: int = 0,
        tp: int = 1,
    ) -> None:
        """Allocate the slice of a whole matrix [rows, columns] without values (see `fill`).

        `partition_dim` and `stride` are those of Megatron's parameter: 0 cuts rows, or each of `stride` blocks of rows
        (gate and up of a GLU); 1 cuts columns; None gives every rank the whole.
        """
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"bits={bits} is not a width of a quantised weight; choose from 4, 8")
        if partition_dim is None or tp == 1:
            partition_dim, stride, rank, tp = 0, 1, 0, 1
        if (rows, columns)[partition_dim] % (stride * tp) or (partition_dim == 1 and stride != 1):
            raise ValueError(f"a matrix [{rows}, {columns}] has no {tp} slices of {partition_dim=} and {stride=}")
        by_rows = partition_dim == 0
        self.bits, self.dtype, self.whole_shape = bits, dtype, (rows, columns)
        self.rows, self.columns = (rows // tp, columns) if by_rows else (rows, columns // tp)
        # Local row r is row (r // piece) * hop + first_row + r % piece of the whole matrix.
        self.piece = self.rows // stride
        self.hop = self.piece * tp if by_rows else 0
        self.first_row, self.first_column = (self.piece * rank, 0) if by_rows else (0, self.columns * rank)
        self.first_block, self.skipped = divmod(self.first_column, BLOCK)
        blocks = _blocks(self.skipped + self.columns)
        groups = -(-rows * _blocks(columns) // GROUP)
        width = self.columns if bits == 8 else -(-self.columns // 2)
        for name, shape, kind in (
            ("codes", (self.rows, width), torch.int8 if bits == 8 else torch.uint8),
            ("absmax", (self.rows, blocks), torch.uint8),
            ("scales", (groups + 1,), torch.int32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device), persistent=False)

    @property
    def bytes(self) -> int:
        """Return the bytes that this rank's slice occupies."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Quantise the whole matrix and keep this rank's slice. Temporary memory is a few chunks and the absmax."""
        if tuple(whole.shape) != self.whole_shape:
            raise ValueError(f"a matrix {list(whole.shape)} was given for one of {list(self.whole_shape)}")
        device = self.codes.device
        step = self._chunk(self.whole_shape[1])
        absmax = torch.cat([_absmax(part.to(device, torch.float32)) for part in whole.split(step)])
        if not bool(absmax.isfinite().all()):
            row = int(absmax.isfinite().all(1).logical_not().int().argmax())
            raise NumericsError(
                f"row {row} of the weight holds NaN or infinity and cannot be quantised: fetch the base model again, "
                "or use an earlier checkpoint of its training",
                key="weight",
                where=f"row {row}",
            )
        codes, scales = _compress(absmax)
        mine = slice(self.first_block, self.first_block + self.absmax.shape[1])
        columns = slice(self.first_column, self.first_column + self.columns)
        self.scales.copy_(scales.view(torch.int32))
        step = self._chunk(self.columns)
        for start in range(0, self.rows, step):
            rows = self._whole_rows(start, min(start + step, self.rows))
            values = whole[:, columns].index_select(0, rows.to(whole.device)).to(device, torch.float32, copy=True)
            _multiply_blocks(values, 1.0 / absmax[rows, mine].clamp(min=SMALLEST), self.skipped)
            self.absmax[start : start + step] = codes[rows, mine]
            self.codes[start : start + step] = _pack_nf4(values) if self.bits == 4 else values.mul_(127.0).round_()

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """Return this rank's slice [rows, columns] in `dtype`."""
        weight = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.codes.device)
        for start, stop in self._chunks():
            weight[start:stop] = self._part(start, stop)
        return weight

    def product(self, x: Tensor) -> Tensor:
        """Compute x @ weight.T, differentiable in x [..., columns]; never dequantise more than a chunk of the weight.

        The backward pass dequantises again, so that nothing is kept for it.
        """
        result: Tensor = _Product.apply(x, self)
        return result

    def extra_repr(self) -> str:
        """Describe the slice where the model is printed."""
        return f"rows={self.rows}, columns={self.columns}, bits={self.bits}, dtype={self.dtype}"

    def _part(self, start: int, stop: int) -> Tensor:
        """Return the local rows from `start` to `stop` in `dtype`."""
        codes, absmax = self.codes[start:stop], self._dequantised_absmax(start, stop)
        if self.bits == 8:
            values, absmax = codes.float(), absmax / 127.0
        else:  # one lookup gives the two values of a byte, as one number of 8 bytes
            pairs = _tables(codes.device).pairs.index_select(0, codes.flatten().int())
            values = pairs.view(torch.float32).view(stop - start, -1)[:, : self.columns]
        _multiply_blocks(values, absmax, self.skipped)
        return values.to(self.dtype)

    def _dequantised_absmax(self, start: int, stop: int) -> Tensor:
        """Return the absmax [rows, blocks] of the local rows from `start` to `stop`."""
        codes, scales = self.absmax[start:stop], self.scales.view(torch.float32)
        block = torch.arange(self.first_block, self.first_block + codes.shape[1], device=codes.device)
        group = (self._whole_rows(start, stop)[:, None] * _blocks(self.whole_shape[1]) + block) // GROUP
        shares = _tables(codes.device).dynamic.index_select(0, codes.flatten().int())
        return (shares * scales.index_select(0, group.flatten()) + scales[-1]).view(codes.shape)

    def _whole_rows(self, start: int, stop: int) -> Tensor:
        """Return the indices in the whole matrix of the local rows from `start` to `stop`."""
        row = torch.arange(start, stop, device=self.codes.device)
        return row // self.piece * self.hop + self.first_row + row % self.piece

    def _chunks(self) -> list[tuple[int, int]]:
        """Return (start, stop) of chunks of local rows, of nearly equal size."""
        count = -(-self.rows // self._chunk(self.columns))
        edges = [self.rows * index // count for index in range(count + 1)]
        return list(pairwise(edges))

    def _chunk(self, columns: int) -> int:
        """Return how many rows of so many columns are handled at once."""
        return max(1, (CPU_CHUNK if self.codes.is_cpu else GPU_CHUNK) // columns)


class _Product(torch.autograd.Function):
    """x @ weight.T of a weight that is dequantised in chunks of rows, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight) -> Tensor:
        ctx.weight = weight
        flat = x.reshape(-1, weight.columns)
        result = x.new_empty(flat.shape[0], weight.rows)
        for start, stop in weight._chunks():
            linear_into(result[:, start:stop], flat, weight._part(start, stop))
        return result.view(*x.shape[:-1], weight.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight: QuantisedWeight = ctx.weight
        flat = gradient.reshape(-1, weight.rows)
        total = torch.zeros(flat.shape[0], weight.columns, device=flat.device)  # float32: a sum over chunks
        for start, stop in weight._chunks():
            add_product(total, flat[:, start:stop], weight._part(start, stop))
        return total.to(gradient.dtype).view(*gradient.shape[:-1], weight.columns), None


class _Tables(NamedTuple):
    pairs: Tensor  # [256] the two NF4 values of each byte, as a number of 8 bytes
    dynamic: Tensor  # [256] the values of the signed dynamic 8-bit map


@cache
def _tables(device: torch.device) -> _Tables:
    nf4 = torch.tensor(NF4, device="cpu")
    pairs = torch.stack([nf4.repeat_interleave(16), nf4.repeat(16)], dim=1)
    return _Tables(pairs.view(torch.float64).flatten().to(device), _dynamic_map().to(device))


def _dynamic_map() -> Tensor:
    """Return the 256 values of the signed dynamic map (https://arxiv.org/abs/1511.04561), from -0.993 to 1: each power
    of ten has twice the values of the one below it."""
    positive = []
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6))
    values = torch.cat(positive)
    values = torch.cat([values, -values, values.new_tensor([0.0, 1.0])])
    return torch.msort(values)


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _absmax(values: Tensor) -> Tensor:
    """Return the absmax [rows, blocks] of values [rows, columns] that start with a block."""
    padded = F.pad(values, (0, -values.shape[1] % BLOCK))
    return padded.reshape(len(values), -1, BLOCK).abs().amax(2)


def _compress(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise absmax [rows, blocks] of a whole matrix: 8-bit codes, and the groups' scales followed by the offset."""
    offset = _mean(absmax)
    flat = (absmax - offset).flatten()
    groups = F.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(1)
    codes = _nearest(groups * (1.0 / scales.clamp(min=SMALLEST))[:, None], _tables(flat.device).dynamic)
    return codes.to(torch.uint8).flatten()[: len(flat)].view(absmax.shape), torch.cat([scales, offset[None]])


def _mean(absmax: Tensor) -> Tensor:
    """Return the mean, rounded to float32. A sum of integers has the same bits for any order of adding, and so for any
    number of threads and any device."""
    step = absmax.max().double().clamp(min=SMALLEST) / 2**36
    steps = (absmax.double() / step).round().long()
    return (steps.sum().double() / steps.numel() * step).float()


def _nearest(values: Tensor, choices: Tensor) -> Tensor:
    """Return the index of the nearest of the sorted `choices`, the lower one in the middle between two."""
    return torch.bucketize(values, _middles(choices), out_int32=True)


def _middles(choices: Tensor) -> Tensor:
    return (choices[:-1] + choices[1:]) / 2


def _pack_nf4(shares: Tensor) -> Tensor:
    """Return the nearest NF4 codes of shares of the absmax [rows, columns], two a byte."""
    codes = torch.zeros(shares.shape, dtype=torch.uint8, device=shares.device)
    for middle in _middles(torch.tensor(NF4, device="cpu")).tolist():  # several times as fast as torch.bucketize
        codes += (shares > middle).view(torch.uint8)
    codes = F.pad(codes, (0, shares.shape[1] % 2))
    return codes[:, ::2] << 4 | codes[:, 1::2]


def _multiply_blocks(values: Tensor, factors: Tensor, skipped: int) -> None:
    """Multiply values [rows, columns] in place by their blocks' factors [rows, blocks]; the first block lacks its
    first `skipped` values."""
    if skipped or values.shape[1] % BLOCK:
        spread = factors[:, :, None].expand(-1, -1, BLOCK).flatten(1)
        values *= spread[:, skipped : skipped + values.shape[1]]
    else:
        values.unflatten(1, (-1, BLOCK)).mul_(factors[:, :, None])
