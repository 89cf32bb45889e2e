"""Megatron's parallel linear layers and word embedding for machines without a GPU: the bias is added inside the matrix
product, and the gradient of a weight is added directly to Megatron's gradient buffer.

They are not for GPUs: there Transformer Engine's kernels do the same, or Megatron's own layers are used.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor

from megarl.parallel.gradients import gradient_buffer, handed_over
from megarl.parallel.products import add_product, by_onednn, linear, pad_rows


class ColumnLinear(ColumnParallelLinear):
    """Linear layer with output features split over the tensor-parallel ranks. The bias is always added inside, because
    it is local to this rank and nothing has to be summed first."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "skip_bias_add": False})

    def forward(self, input_: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return x @ weight.T + bias [..., out of this rank, or all of out with `gather_output`], and None."""
        alone = self.tp_group.size() == 1 or not torch.is_grad_enabled()  # no communication is needed
        if alone and not self.sequence_parallel and not self.gather_output and weight is None:
            return affine(input_, self.weight, self.bias), None
        result: tuple[Tensor, Tensor | None] = super().forward(input_, weight, **options)
        return result

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:  # noqa: A002
        if options["sequence_parallel"]:  # Megatron's version overlaps the gather of tokens with the products
            gathered: Tensor = super()._forward_impl(input=input, weight=weight, bias=bias, **options)
            return gathered
        group = options["tp_group"] if options["allreduce_dgrad"] else None
        product: Tensor = _Linear.apply(input, weight, bias, group)
        return product


class RowLinear(RowParallelLinear):
    """Linear layer with input features split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sum over ranks of x @ weight.T, with the bias added or as the second result."""
        if self.tp_group.size() > 1 or not self.input_is_parallel:  # partial products are summed first
            summed: tuple[Tensor, Tensor | None] = super().forward(input_)
            return summed
        return affine(input_, self.weight, self.bias), None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:  # noqa: A002
        return affine(input, weight, bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ weight.T + bias, with gradients if they are needed; x [..., in], weight [out, in]."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias, None)
    return result


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ weight.T + bias without a gradient, for any number of rows; x [..., in], weight [out, in].

    With MKL, a product with few rows (as in generation) and a large weight is up to a third faster when the rows are
    its columns. Smaller weights, and fewer rows, are faster as they are.
    """
    out, inner = weight.shape
    rows = x.numel() // inner
    if by_onednn(x):
        return linear(pad_rows(x.reshape(rows, inner)), weight, bias)[:rows].view(*x.shape[:-1], out)
    if not (6 <= rows <= 64 and weight.numel() >= 2**19 and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, inner).t().contiguous()
    result = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return result.t().contiguous().view(*x.shape[:-1], out)


def pad_for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors [n, ...] padded with zero rows to a common size, if the library of the first needs it.

    For an n that changes with nearly every call: a library that compiles a kernel per n then sees only a few sizes.
    The caller must drop the results of the padding.
    """
    return tuple(pad_rows(tensor) for tensor in tensors) if by_onednn(tensors[0]) else tensors


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; x [..., in], weight [out, in]. With a group, the gradient of x is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
        # A frozen weight needs no gradient, so its input is not kept.
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.group = group
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_bias = summing = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.t()).view(*grads[0].shape[:-1], weight.shape[1])
            if ctx.group is not None:  # overlaps the computation of the weight's gradient
                summing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, weight.shape[1])
            buffer = gradient_buffer(weight, grad.dtype)
            if buffer is None and weight.shape[0] > weight.shape[1]:  # oneDNN copies the first factor: the narrow one
                grad_weight = linear(rows.t(), grad.t()).t()
            elif buffer is None:
                grad_weight = linear(grad.t(), rows.t())
            else:
                add_product(buffer, grad.t(), rows)
                grad_weight = handed_over(weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, grad_bias, None


class WordEmbedding(VocabParallelEmbedding):
    """Embedding table whose gradient touches only the rows that were looked up."""

    def forward(self, input_: Tensor) -> Tensor:
        """Return the rows [..., hidden] of the tokens [...]."""
        if self.tp_group.size() > 1:  # rows of other ranks are masked, and results are summed over ranks
            summed: Tensor = super().forward(input_)
            return summed
        rows: Tensor = _Lookup.apply(input_, self.weight)
        return rows


class _Lookup(torch.autograd.Function):
    """weight[tokens]; tokens of any shape, weight [rows, hidden]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        tokens, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None
        buffer = gradient_buffer(weight, grads[0].dtype)
        total = torch.zeros_like(weight) if buffer is None else buffer
        total.index_add_(0, tokens.reshape(-1), grads[0].reshape(-1, weight.shape[1]))
        return None, total if buffer is None else handed_over(weight)
