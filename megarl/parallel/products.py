"""Matrix products on a CPU, by the faster of the two libraries that torch carries.

MKL, which torch takes for float32, uses AVX2 on AMD's processors whatever they can do. oneDNN uses AVX-512 there and is
twice as fast. For dense float32 tensors torch offers it only as the operator that its compiler calls.

oneDNN compiles a kernel for every shape: about a millisecond and a megabyte each, so the shapes that are kept are
limited, and where numbers of rows would all differ they are rounded up to few (`pad_rows`). What follows from the
choice of a library is decided here and in `models/linear.py` alone; whoever multiplies need not know of it.
"""

import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.parallel.packing import round_up_to_bucket

KERNELS_KEPT = 128
BLOCK = 2**18  # elements of a product that is added to something larger: they stay in a core's cache meanwhile


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias without a gradient; x [..., in], weight [out, in] of any strides, bias [out].

    `out` is memory that may be used for the result of an x [rows, in].
    """
    result: Tensor
    if bias is not None:
        bias = bias.contiguous()  # oneDNN does not look at its strides
    if x.numel() and by_onednn(x):  # oneDNN refuses a sum over nothing
        result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    elif out is None:
        result = F.linear(x, weight, bias)
    elif bias is None:
        result = torch.mm(x, weight.t(), out=out)
    else:
        result = torch.addmm(bias, x, weight.t(), out=out)
    return result


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place; `total` may be wider than the dtype of the two."""
    if total.dtype != a.dtype:
        total += a @ b
    elif by_onednn(a):
        if a.shape[0] > b.shape[1] and a.shape[1] >= 2 * b.shape[1]:  # a tall sum of many terms is faster lying down
            total, a, b = total.t(), b.t(), a.t()
        columns, size = b.t(), max(64, BLOCK // total.shape[1])
        for start in range(0, total.shape[0], size):
            total[start : start + size] += linear(a[start : start + size], columns)
    else:
        total.addmm_(a, b)


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out [rows, out] = x @ weight.T, without a gradient; `out` may be a view of something larger."""
    result = linear(x, weight, out=out)
    if result is not out:
        out.copy_(result)


def reusable_output(x: Tensor, rows: int, columns: int) -> Tensor | None:
    """Return memory [rows, columns] for the `out` of several products of parts of `x`; None where the library takes
    fresh memory for each."""
    return None if by_onednn(x) else x.new_empty(rows, columns)


def pad_rows(x: Tensor) -> Tensor:
    """x [rows, ...] with rows of zeros behind it, up to one of few sizes."""
    spare = round_up_to_bucket(x.shape[0]) - x.shape[0]
    return torch.cat([x, x.new_zeros(spare, *x.shape[1:])]) if spare else x


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies this by others like it."""
    return x.dtype is torch.float32 and x.is_cpu and onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """On AMD's processors with AVX-512. A rule and no measurement, since both libraries round in their own ways and a
    run that is resumed must go on with the same bits."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    faster = torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()
    if faster:  # read once, by the first call
        os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNELS_KEPT))
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    return faster


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
