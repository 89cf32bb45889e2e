from typing import Any

import torch
from torch import Tensor, nn


class FusedLayerNormAffineFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor,
        normalized_shape: torch.Size,
        eps: float,
        memory_efficient: bool = False,
    ) -> Tensor:
        assert input.dtype == weight.dtype == bias.dtype, "the kernel takes one dtype"
        assert input.device == weight.device == bias.device, "the kernel takes tensors of one device"
        output, mean, scale = torch.native_layer_norm(input.contiguous(), normalized_shape, weight, bias, eps)
        ctx.shape = list(normalized_shape)
        ctx.save_for_backward(input.contiguous(), mean, scale, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, mean, scale, weight, bias = ctx.saved_tensors
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_output.contiguous(), value, ctx.shape, mean, scale, weight, bias, [True, True, True]
        )
        return (*grads, None, None, None)


class FusedLayerNorm(nn.Module):
    """A name that is imported; Megatron has a module of its own over the function."""
