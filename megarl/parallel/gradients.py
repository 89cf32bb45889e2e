"""Where gradients are gathered."""

import torch
from torch import Tensor


def gradient_buffer(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where Megatron gathers this parameter's gradient, if a backward pass may add to it itself: gradients of `dtype`
    on a CPU. Autograd is then given no gradient, which saves making a fresh one and adding it in a second pass. On a
    GPU, Megatron starts a reduction once autograd has handed over the gradient, so it has to be there.
    """
    buffer: Tensor | None = getattr(parameter, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == dtype and buffer.device.type == "cpu" else None
