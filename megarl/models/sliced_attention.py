"""Self-attention under context parallelism: the queries of two slices of time, and the keys of all before them.

A rank gathers the keys and values of all positions. The backward pass gathers them again, so that between the passes
each rank keeps its own part alone, whichever kernel computes attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megarl.parallel.context import TimeSlices
from megarl.parallel.device import device_settings

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class SlicedMasks:
    """The slices of this rank, and for each its mask [bins or 1, 1, queries, keys up to its end] as `attention_mask`
    makes it; None means causal."""

    slices: TimeSlices
    masks: Sequence[Tensor | None]


def attend_in_slices(q: Tensor, k: Tensor, v: Tensor, masks: SlicedMasks, attend: Attend, scale: float) -> Tensor:
    """Return the results of this rank's queries, as `attend` does, [time, batch, heads * head_dim].

    Args:
        q: [batch, heads, time, head_dim] of this rank's slices; k and v: [batch, kv heads, time, head_dim].
        masks: which keys a query attends to.
        attend: computes attention to keys of all positions up to the last query's.
        scale: multiplies the scores.
    """
    slices = masks.slices
    own = torch.stack([k, v])
    whole = slices.shared(own, dim=3)
    kept = _OwnPart(slices, own.detach(), whole)
    bounds = slices.bounds(whole.shape[3])
    parts = []
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        for queries, mask, (begin, end) in zip(q.chunk(2, 2), masks.masks, bounds, strict=True):
            keys, values = whole[0, :, :, :end], whole[1, :, :, :end]
            if mask is None and begin:
                mixed = causal_after(queries, keys, values, scale)
                parts.append(mixed.permute(2, 0, 1, 3).flatten(-2))
            else:
                parts.append(attend(queries, keys, values, mask))
    kept.forget()
    mixed = torch.cat(parts)
    if mixed.requires_grad:  # on all ranks, whatever views their kernels have kept
        mixed.register_hook(kept.gather_again)
    return mixed


class _OwnPart:
    """Hooks that keep this rank's part of keys and values for the backward pass, in the place of views of the whole."""

    def __init__(self, slices: TimeSlices, own: Tensor, whole: Tensor) -> None:
        self.slices, self.own = slices, own
        self.whole: Tensor | None = whole.detach()
        self.uses = 0  # views that the backward pass has not asked for yet

    def pack(self, tensor: Tensor) -> Tensor | _View:
        whole = self.whole
        if whole is None or tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return tensor
        self.uses += 1
        return _View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def forget(self) -> None:
        self.whole = None

    def gather_again(self, _: Tensor) -> None:
        """Gather at the start of the backward pass, if it reads the whole."""
        whole = self.slices.gathered(self.own, dim=3)
        self.whole = whole if self.uses else None

    def unpack(self, packed: Tensor | _View) -> Tensor:
        if not isinstance(packed, _View):
            return packed
        assert self.whole is not None
        view = self.whole.as_strided(packed.shape, packed.stride, packed.offset)
        self.uses -= 1
        if self.uses == 0:
            self.forget()
        return view


@dataclass(frozen=True)
class _View:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def causal_after(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return causal attention of the last positions [batch, heads, queries, head_dim] to those of all keys, without a
    mask in memory."""
    if not device_settings().plain_attention:
        mask = causal_lower_right(q.shape[2], k.shape[2])
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    mixed: Tensor = _CausalAfter.apply(q, k, v, scale)
    return mixed


class _CausalAfter(torch.autograd.Function):
    """`causal_after` from torch's kernel for a CPU, whose causal mask must be square: once over the keys before all
    queries and once over the queries' own. Each also returns the log of its softmax's denominator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        found = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, causal, scale=scale)
            for keys, values, causal in _before_and_own(q, k, v)
        ]
        (before, log_before), (own, log_own) = found
        denominator = torch.logaddexp(log_before, log_own)
        weights = torch.exp(log_before - denominator)[..., None], torch.exp(log_own - denominator)[..., None]
        mixed: Tensor = (before * weights[0] + own * weights[1]).to(q.dtype)
        ctx.save_for_backward(q, k, v, mixed, denominator)
        ctx.scale = scale
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mixed, denominator = ctx.saved_tensors
        # With the denominator of all keys, the kernel returns the gradients of its part of them.
        before, own = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads[0], q, keys, values, mixed, denominator, 0.0, causal, scale=ctx.scale
            )
            for keys, values, causal in _before_and_own(q, k, v)
        )
        return before[0] + own[0], torch.cat([before[1], own[1]], 2), torch.cat([before[2], own[2]], 2), None


def _before_and_own(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """Return the keys and values before all queries, and the queries' own, with whether these are causal."""
    past = k.shape[2] - q.shape[2]
    return [(k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True)]
