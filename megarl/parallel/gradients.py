"""Access to the buffers in which Megatron accumulates gradients."""

import torch
from torch import Tensor

from megarl.parallel.device import device_settings


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
