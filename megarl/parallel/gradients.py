"""Where gradients are gathered."""

import torch
from torch import Tensor

from megarl.parallel.device import device_settings


def gradient_buffer(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where Megatron gathers this parameter's gradient, if a backward pass may add to it itself: gradients of `dtype`.
    This saves making a fresh gradient and adding it in a second pass. Autograd is then given `handed_over(parameter)`.
    """
    buffer: Tensor | None = getattr(parameter, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == dtype else None


def handed_over(parameter: Tensor) -> Tensor | None:
    """What autograd is given for a gradient that is in Megatron's buffer already: nothing, or, where reductions start
    during the backward pass, a stand-in, as Megatron starts one when autograd hands over a gradient."""
    if not device_settings().overlap_grad_reduce:
        return None
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # The gradient of a tied embedding is added to the stand-in, and then to the buffer.
    make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
    return make(parameter)
