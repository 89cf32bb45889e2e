"""Matrix products on a CPU, with the faster of the two libraries that torch ships.

For float32, torch uses MKL, which on AMD processors stays at AVX2 even where they support AVX-512. oneDNN uses AVX-512
there and is twice as fast. For dense float32 tensors, torch exposes it only as an operator for its compiler.

oneDNN compiles a kernel for every shape, at about a millisecond and a megabyte each. The number of cached shapes is
therefore limited, and row counts that vary from call to call are rounded up to a few sizes (`pad_rows`). Only this
module and `models/linear.py` depend on the choice of the library.
"""

import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.parallel.packing import round_up_to_bucket

KERNELS_KEPT = 128
BLOCK = 2**18  # elements of a block of a product that is added to a larger tensor; a block stays in a core's cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias without a gradient; x [..., in], weight [out, in] of any strides, bias [out].

    `out` is optional memory for the result of an x [rows, in].
    """
    result: Tensor
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores its strides
    if x.numel() and by_onednn(x):  # oneDNN rejects a product with an empty dimension
        result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    elif out is None:
        result = F.linear(x, weight, bias)
    elif bias is None:
        result = torch.mm(x, weight.t(), out=out)
    else:
        result = torch.addmm(bias, x, weight.t(), out=out)
    return result


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b, in place; `total` may have a wider dtype than `a` and `b`."""
    if total.dtype != a.dtype:
        total += a @ b
    elif by_onednn(a):
        if a.shape[0] > b.shape[1] and a.shape[1] >= 2 * b.shape[1]:  # tall, long inner dimension: transposed is faster
            total, a, b = total.t(), b.t(), a.t()
        columns, size = b.t(), max(64, BLOCK // total.shape[1])
        for start in range(0, total.shape[0], size):
            total[start : start + size] += linear(a[start : start + size], columns)
    else:
        total.addmm_(a, b)


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Compute out [rows, out] = x @ weight.T, without a gradient; `out` may be a view of a larger tensor."""
    result = linear(x, weight, out=out)
    if result is not out:
        out.copy_(result)


def reusable_output(x: Tensor, rows: int, columns: int) -> Tensor | None:
    """Return memory [rows, columns] for the `out` of several products with slices of `x`; None where the library
    allocates memory for each product itself."""
    return None if by_onednn(x) else x.new_empty(rows, columns)


def pad_rows(x: Tensor) -> Tensor:
    """Return x [rows, ...] padded with rows of zeros to one of a few sizes."""
    spare = round_up_to_bucket(x.shape[0]) - x.shape[0]
    return torch.cat([x, x.new_zeros(spare, *x.shape[1:])]) if spare else x


def by_onednn(x: Tensor) -> bool:
    """Return whether oneDNN multiplies tensors of this dtype and device."""
    return x.dtype is torch.float32 and x.is_cpu and onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN is faster: on AMD processors with AVX-512. This is a fixed rule and not a measurement,
    because the two libraries round differently and a resumed run must reproduce the same bits."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    faster = torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()
    if faster:  # oneDNN and torch read these once, at their first call
        os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNELS_KEPT))
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    return faster


def library() -> str:
    """Return the name of the library that multiplies float32 matrices on this CPU."""
    if onednn_is_faster():
        return "oneDNN"
    return "MKL" if torch.backends.mkl.is_available() else "torch's own"


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
