"""Compute log-probs, entropy and log-sum-exp over a sharded vocabulary without storing a whole batch of logits.

The input is the hidden states of selected positions. The output weight is applied in chunks of positions, and each
chunk of logits is recomputed in the backward pass. All results are float32 (or float64) whatever the model's dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.choices import Choices
from megarl.parallel.gradients import gradient_buffer, handed_over
from megarl.parallel.products import add_product, linear, linear_into, reusable_output

# Elements of one chunk of logits: large enough for an efficient product, small beside the activations of a layer.
CHUNK_ELEMENTS_CPU = 2**23
CHUNK_ELEMENTS_GPU = 2**26


def padded_vocab(size: int, tp: int) -> int:
    """Return the rows of a vocabulary table: a multiple of tp, and of 64 (8 for toy vocabularies) for resharding."""
    multiple = lcm(64 if size >= 1024 else 8, tp)
    return (size + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class VocabShard:
    """The rows of a vocabulary table on this tensor-parallel rank: `valid` ones from `start` on, then padding."""

    start: int
    valid: int  # rows with a token id; the remaining rows are padding and never enter a sum
    rows: int  # with padding; the same on every rank
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, vocab_size: int, tp_rank: int, tp: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """Return the shard of rank `tp_rank`; the group is None without tensor parallelism."""
        rows = padded_vocab(vocab_size, tp) // tp
        start = rows * tp_rank
        valid = max(0, min(vocab_size - start, rows))
        return cls(start=start, valid=valid, rows=rows, group=group if tp > 1 else None)


class VocabStats(NamedTuple):
    """Per position [n]: the scaled logit of the target, the log-sum-exp, and the entropy (None unless requested)."""

    target_logits: Tensor
    lse: Tensor
    entropy: Tensor | None

    @property
    def logprobs(self) -> Tensor:
        """[n] log-probs of the targets."""
        return self.target_logits - self.lse


def vocab_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    choices: Choices | None = None,
) -> VocabStats:
    """Compute statistics of softmax((hidden @ weight.T + bias) / temperature) at each of n positions.

    hidden: [n, hidden], the same on every tensor-parallel rank. Its gradient is this shard's partial sum; the caller
    must sum it over the group (`copy_to_tensor_model_parallel_region` or the sequence gather does so).
    weight: [rows of this shard, hidden]; bias: [rows of this shard]; targets: [n] token ids.
    choices: the tokens that the softmax is over; None for all. Targets must be among them.
    """
    target_logits, lse, mean_logit = _VocabStats.apply(
        hidden, weight, bias, targets, shard, temperature, entropy, choices
    )
    return VocabStats(target_logits, lse, lse - mean_logit if entropy else None)


@torch.no_grad()
def token_outputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, *, bias: Tensor | None = None
) -> Tensor:
    """Return hidden @ weight[target] + bias[target], [n] in float32, without computing the other tokens' logits.

    Arguments as in `vocab_stats`; there is no gradient.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    outputs = hidden.new_zeros(hidden.shape[0], dtype=dtype)
    for rows in _chunks(hidden.shape[0], hidden.shape[1], hidden.device) if shard.valid else ():
        mine, index = _local_targets(targets[rows], shard)
        chosen = torch.einsum("nh,nh->n", hidden[rows].to(dtype), weight[index].to(dtype))
        if bias is not None:
            chosen = chosen + bias[index]
        outputs[rows] = chosen.masked_fill(~mine, 0.0)
    if shard.group is not None:
        dist.all_reduce(outputs, group=shard.group)
    return outputs


class _VocabStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: VocabShard,
        temperature: float,
        entropy: bool,
        choices: Choices | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        n = hidden.shape[0]
        local = hidden.new_zeros(3, n, dtype=dtype)  # target logit, log-sum-exp, mean logit under the local softmax
        if shard.valid == 0:
            local[1] = -torch.inf
        else:
            for rows, logits in _chunks_of_logits(hidden, weight, bias, shard, temperature, dtype, choices):
                mine, index = _local_targets(targets[rows], shard)
                local[0, rows] = logits.gather(1, index[:, None])[:, 0].masked_fill(~mine, 0.0)
                # In place throughout: on a CPU, fresh memory of this size costs as much as the arithmetic.
                largest = logits.amax(1)
                logits.sub_(largest[:, None])
                if entropy:
                    masses = logits.exp()
                    total = masses.sum(1)
                    local[2, rows] = masses.mul_(logits).sum(1).div_(total).add_(largest)
                else:
                    total = logits.exp_().sum(1)
                local[1, rows] = total.log_().add_(largest)
                del logits
        target_logits, lse, mean_logit = _combine(local, shard.group)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, mean_logit)
        ctx.shard, ctx.temperature, ctx.entropy, ctx.dtype, ctx.choices = shard, temperature, entropy, dtype, choices
        return target_logits, lse, mean_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_target, grad_lse, grad_mean = grads
        hidden, weight, bias, targets, lse, mean_logit = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        grad_hidden = torch.zeros_like(hidden)
        # Sum over chunks in float32, so that a bf16 gradient does not depend on the number of chunks.
        grad_weight = buffer = None
        if weight.requires_grad:
            buffer = gradient_buffer(weight, ctx.dtype)
            grad_weight = torch.zeros_like(weight, dtype=ctx.dtype) if buffer is None else buffer
        grad_bias = torch.zeros_like(bias, dtype=ctx.dtype) if bias is not None and bias.requires_grad else None
        valid = slice(0, shard.valid)
        chunks = (
            _chunks_of_logits(hidden, weight, bias, shard, ctx.temperature, ctx.dtype, ctx.choices)
            if shard.valid
            else ()
        )
        for rows, logits in chunks:
            mine, index = _local_targets(targets[rows], shard)
            scale = grad_lse[rows, None]
            if ctx.entropy:  # d mean_logit / d logit = p * (1 + logit - mean_logit)
                scale = scale + grad_mean[rows, None] * (1.0 + logits - mean_logit[rows, None])
            grad = logits.sub_(lse[rows, None]).exp_().mul_(scale)
            grad.scatter_add_(1, index[:, None], (grad_target[rows] * mine)[:, None])
            if ctx.temperature != 1.0:
                grad.div_(ctx.temperature)
            narrow = grad.to(weight.dtype)
            linear_into(grad_hidden[rows], narrow, weight[valid].t())
            if grad_weight is not None:
                add_product(grad_weight[valid], narrow.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias[valid] += grad.sum(0)
            del logits, grad, narrow
        return (
            grad_hidden,
            _for_autograd(grad_weight, buffer, weight),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _for_autograd(grad: Tensor | None, buffer: Tensor | None, weight: Tensor) -> Tensor | None:
    if grad is None:
        return None
    return grad.to(weight.dtype) if buffer is None else handed_over(weight)


def _chunks(n: int, columns: int, device: torch.device) -> list[slice]:
    """Return slices that split `n` rows evenly; the logits of one slice have at most `CHUNK_ELEMENTS_*` elements."""
    budget = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_GPU
    count = max(1, -(-n // max(1, budget // columns)))
    size = max(1, -(-n // count))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _chunks_of_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shard: VocabShard,
    temperature: float,
    dtype: torch.dtype,
    choices: Choices | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows with this shard's scaled logits [rows, valid]. All chunks may share the same memory, and
    the caller may overwrite it."""
    chunks = _chunks(hidden.shape[0], shard.valid, hidden.device)
    weight, bias = weight[: shard.valid], None if bias is None else bias[: shard.valid]
    shared = reusable_output(hidden, chunks[0].stop, shard.valid) if chunks else None
    for rows in chunks:
        out = None if shared is None else shared[: rows.stop - rows.start]
        logits = linear(hidden[rows], weight, bias, out=out).to(dtype)
        if temperature != 1.0:
            logits.div_(temperature)
        yield rows, logits if choices is None else choices.restrict(logits, rows)
        del logits  # free it before the next chunk is made; the caller does the same


def _local_targets(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return a mask [n] of the targets on this shard, and their row in it (0 for targets on other shards)."""
    index = targets - shard.start
    mine = (index >= 0) & (index < shard.valid)
    return mine, index.masked_fill(~mine, 0)


def _combine(local: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the shards' [3, n] statistics. One gather, so that every rank adds in the same order."""
    if group is None:
        return local[0].clone(), local[1].clone(), local[2].clone()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    stacked = torch.stack(parts)  # [tp, 3, n]
    lse = torch.logsumexp(stacked[:, 1], dim=0)
    share = torch.exp(stacked[:, 1] - lse)
    return stacked[:, 0].sum(0), lse, (share * stacked[:, 2]).sum(0)
