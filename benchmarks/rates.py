"""What this machine can do at most: the rates that benchmarks state shares of."""

import time
from collections.abc import Callable
from typing import Any

import torch

from megarl.parallel.products import linear

CPU = torch.device("cpu")
Clock = Callable[[], float]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: torch.device = CPU, clock: Clock = time.perf_counter) -> float:
    """Of one call."""
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def best_of(
    function: Callable[[], Any], device: torch.device = CPU, repeats: int = 40, clock: Clock = time.perf_counter
) -> float:
    return min(seconds(function, device, clock) for _ in range(repeats))


def product_rate(
    rows: int,
    inner: int,
    out: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    own: bool = True,
    clock: Clock = time.perf_counter,
) -> float:
    """Operations per second of [rows, inner] x [inner, out]: of torch's product, and if `own` of the one that models
    use, whichever is faster."""
    x, weight = torch.randn(rows, inner, device=device).to(dtype), torch.randn(out, inner, device=device).to(dtype)
    result = torch.empty(rows, out, device=device, dtype=dtype)
    best = best_of(lambda: torch.mm(x, weight.t(), out=result), device, clock=clock)
    if own:
        best = min(best, best_of(lambda: linear(x, weight), device, clock=clock))
    return 2 * rows * inner * out / best


def copy_bandwidth(megabytes: int = 256, device: torch.device = CPU) -> float:
    """Bytes per second that are read and written by copying what no cache holds."""
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_of(lambda: target.copy_(source), device, repeats=10)
