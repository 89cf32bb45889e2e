"""Megatron's parallel linear layers for machines without a GPU: the bias is added inside the product, and the gradient of
a weight is added straight to Megatron's gradient buffer.

On a GPU, Transformer Engine's or Apex's kernels do the same, and Megatron's own layers stay as they are.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megarl.parallel.vocab import gradient_buffer


class ColumnLinear(ColumnParallelLinear):
    """Output features split over the tensor-parallel ranks. A bias never comes back as a second result: it is this
    rank's own, so nothing has to be summed before it is added."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "skip_bias_add": False})

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:  # noqa: A002
        if options["sequence_parallel"]:  # Megatron's overlaps the gather of the tokens with the products
            gathered: Tensor = super()._forward_impl(input=input, weight=weight, bias=bias, **options)
            return gathered
        group = options["tp_group"] if options["allreduce_dgrad"] else None
        product: Tensor = _Linear.apply(input, weight, bias, group)
        return product


class RowLinear(RowParallelLinear):
    """Input features split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1 or not self.input_is_parallel:  # partial products are summed first
            summed: tuple[Tensor, Tensor | None] = super().forward(input_)
            return summed
        return _Linear.apply(input_, self.weight, self.bias, None), None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:  # noqa: A002
        product: Tensor = _Linear.apply(input, weight, bias, None)
        return product


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; x [..., in], weight [out, in]. With a group, the gradient of x is summed over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
        # A frozen weight needs no gradient, so the activations it saw are not kept.
        ctx.save_for_backward(x if weight.requires_grad else None, weight, bias)
        ctx.group = group
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_bias = summing = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.mm(weight).view(*grads[0].shape[:-1], weight.shape[1])
            if ctx.group is not None:  # meanwhile the weight's gradient is computed
                summing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, weight.shape[1])
            buffer = gradient_buffer(weight, grad.dtype)
            if buffer is None:
                grad_weight = grad.t().mm(rows)
            else:
                buffer.addmm_(grad.t(), rows)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, grad_bias, None
