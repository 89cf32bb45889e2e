"""Settings that differ between a GPU and a CPU, apart from the device itself, as flags that are set only here.

A GPU's flags can be used without a GPU: the environment variable MEGARL_GPU_SETTINGS=1 does so for every command, and
`assumed(GPU)` for a block of code. This tests GPU-only code paths on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache

import torch

from megarl.errors import ConfigError

VARIABLE = "MEGARL_GPU_SETTINGS"


@dataclass(frozen=True)
class DeviceSettings:
    """The flags of one kind of device.

    Attributes:
        overlap_grad_reduce: reduce a bucket of gradients over replicas as soon as it is full, during the backward pass.
        batched_p2p: send and receive between pipeline stages in one batch of operations.
        cpu_layers: use megarl's linear layers and embedding, which add their gradients to Megatron's buffer.
        plain_attention: compute attention of short sequences as two matrix products instead of torch's fused kernels.
        pinned_copies: keep weights that are swapped in and out in page-locked host memory, and copy without waiting.
        repeats_exactly: the same pass over the same weights gives the same bits. NCCL may sum in another order.
    """

    overlap_grad_reduce: bool
    batched_p2p: bool
    cpu_layers: bool
    plain_attention: bool
    pinned_copies: bool
    repeats_exactly: bool

    def __str__(self) -> str:
        return " ".join(f"{name}={'on' if value else 'off'}" for name, value in asdict(self).items())


CPU = DeviceSettings(
    overlap_grad_reduce=False,
    batched_p2p=False,
    cpu_layers=True,
    plain_attention=True,
    pinned_copies=False,
    repeats_exactly=True,
)
GPU = DeviceSettings(
    overlap_grad_reduce=True,
    batched_p2p=True,
    cpu_layers=False,
    plain_attention=False,
    pinned_copies=True,
    repeats_exactly=False,
)

_assumed: DeviceSettings | None = None


def device_settings() -> DeviceSettings:
    """Return the flags of this process."""
    return _of_this_machine() if _assumed is None else _assumed


@cache
def _of_this_machine() -> DeviceSettings:
    asked = os.environ.get(VARIABLE, "0")
    if asked not in ("", "0", "1"):
        raise ConfigError(
            f"{VARIABLE}={asked} is not a valid value: use 1 to try a GPU's settings on a CPU, or 0",
            key=VARIABLE,
            value=asked,
            offers={VARIABLE: ["1", "0"]},
        )
    return GPU if asked == "1" or torch.cuda.is_available() else CPU


@contextmanager
def assumed(settings: DeviceSettings) -> Iterator[None]:
    """Use other flags in a block of code, in which engines are built, trained and evaluated."""
    global _assumed
    before, _assumed = _assumed, settings
    try:
        yield
    finally:
        _assumed = before
