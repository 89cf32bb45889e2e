"""The buffers in which Megatron accumulates gradients."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from megarl.parallel.device import device_settings
from megarl.parallel.grid import Grid
from megarl.parallel.megatron_versions import hide_notices


def gradient_buffer(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return Megatron's buffer for this parameter's gradient if a backward pass may add gradients of `dtype` to it.

    This avoids allocating a gradient and adding it in a second pass. The backward pass then returns
    `handed_over(parameter)` to autograd.
    """
    buffer: Tensor | None = getattr(parameter, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == dtype else None


def handed_over(parameter: Tensor) -> Tensor | None:
    """Return the gradient for autograd when the real one is already in Megatron's buffer: None, or a placeholder where
    reductions overlap the backward pass, because Megatron starts one when autograd delivers a gradient."""
    if not device_settings().overlap_grad_reduce:
        return None
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # The gradient of a tied embedding is added to the placeholder, and then to the buffer.
    make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
    return make(parameter)


class _GradientBuffers(DistributedDataParallel):
    """Megatron's DDP, except that a single replica sends nothing: gloo would copy all gradients to itself and back."""

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        if self.dp_cp_group.size() > 1 or self.ddp_config.overlap_grad_reduce:
            super().finish_grad_sync(force_all_reduce)

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        if self.dp_cp_group.size() > 1:
            super().start_param_sync(*unused, force_sync=force_sync, force_dispatch=force_dispatch)


def with_gradient_buffers(model: Any, grid: Grid, index: int) -> DistributedDataParallel:
    """Wrap a chunk in Megatron's DDP: contiguous float32 gradients, sharded over data-parallel ranks."""
    hide_notices()
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=device_settings().overlap_grad_reduce,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,
    )
    return _GradientBuffers(
        config=model.config, ddp_config=config, module=model, disable_bucketing=index > 0, pg_collection=grid.groups
    )
