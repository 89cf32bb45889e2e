"""LayerNorm and RMSNorm with sequence parallelism (torch's lack it, and Megatron's wrapper of them rejects it)."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Layer normalisation with scale and shift per channel. Under sequence parallelism each rank has a slice of the
    tokens; the attribute on the parameters makes Megatron sum their gradients over the tensor-parallel group."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden] to mean 0 and variance 1, then scale and shift."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Normalisation by the root mean square, with a scale per channel."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Divide x [..., hidden] by its root mean square, then scale."""
        if not x.is_cpu or x.dtype not in (torch.float32, torch.float64):
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        if not torch.is_grad_enabled():
            return (x * _inverse_rms(x, self.eps)).mul_(self.weight)
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return result


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight; x [..., hidden]. On a CPU, torch has no kernel for it: its single operations take twice as
    long, and keep another copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        products = grads[0] * normed
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = products.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            along = torch.mv(products.flatten(0, -2), weight).view(inverse.shape)  # part that the division removes
            grad_x = (grads[0] * weight).addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(inverse)
        return grad_x, grad_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / rms(x), [..., 1]. One reduction, as a product of x with itself would be written to memory first."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a scalar on the CPU. For single tokens, converting a number at every call takes as long as the sum."""
    return torch.tensor(value, dtype=dtype, device="cpu")
