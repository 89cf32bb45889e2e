"""Self-attention on Megatron's parallel linears and torch's scaled_dot_product_attention."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend

from megarl.logging import get_logger
from megarl.models.cache import CacheView
from megarl.models.config import GPTConfig
from megarl.models.kernels import kernels
from megarl.models.rotary import Rotation, rotate
from megarl.models.sliced_attention import SlicedMasks, attend_in_slices
from megarl.parallel.device import device_settings
from megarl.parallel.rows import Origins
from megarl.parallel.shards import sharded_tensor

log = get_logger(__name__)
_logged: set[tuple[object, ...]] = set()
SHORT = 64  # largest number of queries for which two matrix products beat torch's fused kernel on a CPU
LARGE_SCORES = 2**30
"""Size in bytes of a layer's scores above which a kernel that keeps them is warned about."""
ALIGNED = 8  # torch's fused kernels on a GPU need masks whose rows begin at multiples of this


@dataclass
class Context:
    """The inputs of layers besides the hidden states; made once per forward pass of a chunk.

    `mask` [batch or 1, 1, time, keys] is True where a query may attend, or a float to add to the scores. None means
    plain causal attention, which needs no mask because batches are right-padded, or a single token that sees all keys.
    `origins` says which row each token comes from, to the router of a mixture of experts; None while generating.
    `sliced` takes the place of the mask under context parallelism, when hidden states are those of two slices of time.
    """

    rotation: Rotation | None
    mask: Tensor | None
    cache: CacheView | None = None
    relative: "RelativePositions | None" = None
    origins: Origins | None = None
    sliced: SlicedMasks | None = None


@dataclass
class RelativePositions:
    """Learned values that are added to the scores by the distance of key and query (T5, arXiv:1910.10683).

    Each layer looks them up itself, unless `shared` did so before: full recomputation would run the backward pass of a
    shared look-up once per layer, and fused kernels keep the gradient of every layer's mask for all rows.

    Attributes:
        table: [buckets, local heads], of the first layer.
        buckets: [batch or 1, time, keys], the bucket of each distance.
        values: [batch or 1, local heads, time, keys], looked up for all layers.
        added: [batch, local heads, time, keys], the same values with the mask, without a gradient.
    """

    table: Tensor
    buckets: Tensor
    values: Tensor | None = None
    added: Tensor | None = None

    def look_up(self, dtype: torch.dtype) -> Tensor:
        """Return the values to add to the scores, [batch or 1, local heads, time, keys]."""
        # Contiguous: torch's fused kernels on a GPU need masks whose keys are adjacent, and others keep all scores.
        return F.embedding(self.buckets, self.table).to(dtype).permute(0, 3, 1, 2).contiguous()

    def add_to(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return a mask to add to the scores, [batch or 1, local heads, time, keys], from one without positions."""
        values = self.look_up(dtype)
        return values if mask is None else values + mask

    def shared(self, mask: Tensor | None, dtype: torch.dtype) -> "RelativePositions":
        """Return these positions with their values, and with what is added to the scores together with a mask."""
        values = self.look_up(dtype)
        return replace(self, values=values, added=values.detach() if mask is None else values.detach() + mask)


def buckets(distance: Tensor, count: int, longest: int, *, both_sides: bool) -> Tensor:
    """Return the bucket of each distance (position of the key minus that of the query).

    Half of a side's buckets hold one distance each; the others grow logarithmically up to `longest`, and the last holds
    all above. An encoder has buckets for keys on both sides; a decoder for earlier keys alone.
    """
    side = torch.zeros_like(distance)
    if both_sides:
        count //= 2
        side = (distance > 0).long() * count
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    far = exact + (
        torch.log(distance.clamp(min=1).float() / exact) / math.log(longest / exact) * (count - exact)
    ).long().clamp(max=count - exact - 1)
    return side + torch.where(distance < exact, distance, far)


def attention_mask(
    segment_ids: Tensor | None,
    time: int,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    queries: tuple[int, int] | None = None,
    always: bool = False,
) -> Tensor | None:
    """Return a mask that is causal, within documents (segment_ids [batch, time]; 0 is padding) and within the window.

    `queries` are the first position that attends and the one after the last, which ends the keys too; None: all. With
    `always` there is a mask where a kernel's own causal one would do.

    With a GPU's settings, the mask is a float to add, in the model's dtype, and shared by all layers. Torch would make
    one from each layer's boolean mask and keep it for the backward pass.
    """
    plain = device_settings().plain_attention
    begin, end = queries or (0, time)
    short = plain and end - begin <= SHORT
    if segment_ids is None and (window is None or window >= end) and not short and not always:
        return None
    rows = torch.arange(end, device=device)
    distance = rows[begin:, None] - rows[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None, None]
    if segment_ids is not None:
        # Padding forms a separate document, so that no softmax is over an empty set.
        allowed = allowed & (segment_ids[:, None, begin:end, None] == segment_ids[:, None, None, :end])
    if plain and not short:
        return allowed
    width = end if plain else -(-end // ALIGNED) * ALIGNED
    mask = torch.zeros((*allowed.shape[:-1], width), dtype=torch.float32 if plain else dtype, device=device)
    return mask[..., :end].masked_fill_(~allowed, -torch.inf)


class Attention(MegatronModule):
    """What attention to the own sequence and to an encoder share."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config=config)
        self.config: GPTConfig = config
        self.recompute = config.recompute_granularity == "selective"
        # With relative positions, scores are not divided by the root of the head's width (T5).
        self.scale = 1.0 if config.position == "relative" else config.head_dim**-0.5

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: RelativePositions | None = None
    ) -> Tensor:
        """Attend over [batch, heads, time, head_dim] tensors; returns [time, batch, heads * head_dim].

        Recomputation repeats a layer's own look-up of relative positions, which has a value for every pair of tokens
        and head.
        """
        if relative is not None and device_settings().plain_attention:
            found = relative if relative.values is not None else relative.shared(mask, q.dtype)
            return self._recomputed(self._attend_by_distance, q, k, v, found.added, found.values)
        table, buckets = (None, None) if relative is None else (relative.table, relative.buckets)
        return self._recomputed(self._attend, q, k, v, mask, table, buckets)

    def _recomputed(self, attend: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """Return `attend(*tensors)`; with selective recomputation, the backward pass repeats it."""
        if self.recompute and self.training:
            mixed: Tensor = checkpoint(attend, False, *tensors)
            return mixed
        return attend(*tensors)

    def _attend_by_distance(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor, values: Tensor) -> Tensor:
        """Attend over [batch, heads, time, head_dim] tensors; returns [time, batch, heads * head_dim]. `added` and
        `values` are those of relative positions."""
        dropout = self.config.attention_dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            mixed = attend_by_distance(q, k, v, added, values, dropout)
        return mixed.to(q.dtype).permute(2, 0, 1, 3).flatten(-2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, table: Tensor | None, buckets: Tensor | None
    ) -> Tensor:
        """Attend over [batch, heads, time, head_dim] tensors; returns [time, batch, heads * head_dim]. `table` and
        `buckets` are those of relative positions."""
        if table is not None and buckets is not None:
            mask = RelativePositions(table, buckets).add_to(mask, q.dtype)
        dropout = self.config.attention_dropout if self.training else 0.0
        causal = mask is None and q.shape[2] == k.shape[2] > 1
        grouped = q.shape[1] != k.shape[1]
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        special = mask is not None or grouped
        if dropout == 0.0 and not causal and q.shape[2] <= _few(special):
            mixed = _attend_in_products(q, k, v, mask, self.scale)
        else:
            if grouped and mask is not None and not device_settings().plain_attention:
                # Fused kernels with masks may lack grouped heads; torch's unfused kernel keeps all scores.
                k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
                grouped = False
            if not device_settings().plain_attention:
                log_kernel(q, k, v, mask, dropout, causal, grouped)
            with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
                mixed = F.scaled_dot_product_attention(
                    q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=self.scale, enable_gqa=grouped
                )
        return mixed.permute(2, 0, 1, 3).flatten(-2)


class SelfAttention(Attention):
    """Fused QKV projection, optional QK-norm, rotary positions, grouped heads, output projection.

    Weights have Megatron's layout: per key-value head its queries, then the key, then the value. If there are fewer
    key-value heads than tensor-parallel ranks, the projection is still split evenly and its output is gathered.
    """

    def __init__(self, config: GPTConfig, layer_number: int, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.groups, self.tp_group = groups, groups.tp
        tp = groups.tp.size()
        parts = kernels(config.kernels)
        self.queries_per_kv = config.num_attention_heads // config.num_kv_heads
        self.shares_kv_heads = config.num_kv_heads < tp
        rows = config.head_dim * (config.num_attention_heads + 2 * config.num_kv_heads)
        self.linear_qkv = parts.column(
            config.hidden_size,
            rows,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=groups.tp,
        )
        self.linear_proj = parts.row(
            config.head_dim * config.num_attention_heads,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.out_bias,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=groups.tp,
        )
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            norm = parts.norm(config.normalization)
            self.q_layernorm = norm(config=config, hidden_size=config.head_dim, eps=config.layernorm_epsilon)
            self.k_layernorm = norm(config=config, hidden_size=config.head_dim, eps=config.layernorm_epsilon)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """Return the attention output for hidden [time, batch, hidden], with the same shape.

        Under sequence parallelism, hidden has a tp-th of the time steps.
        """
        query, key, value = self._project(hidden)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if context.rotation is not None:
            query = rotate(query, context.rotation, self.config.rope.interleaved)
            key = rotate(key, context.rotation, self.config.rope.interleaved)
        query = query.permute(1, 2, 0, 3)  # [batch, heads, time, head_dim], as for keys and values
        if context.cache is not None:
            key, value = context.cache.extend(self.layer_number, key, value)
        else:
            key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        if context.sliced is None:
            mixed = self.attend(query, key, value, context.mask, context.relative)
        else:
            mixed = attend_in_slices(query, key, value, context.sliced, self.attend, self.scale)
        output: Tensor = self.linear_proj(mixed)[0]  # the bias is added already
        return output

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        """Return Megatron's description of this rank's weights, in which a table of relative positions is split by
        heads: Megatron itself knows only how the weights of its layers are split."""
        found, table = super().sharded_state_dict(prefix, *args, **kwargs), getattr(self, "relative_positions", None)
        if table is not None:
            key = f"{prefix}relative_positions"
            found[key] = sharded_tensor(key, table, self.groups)
        return found

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of this rank's heads, each [time, batch, heads, head_dim]."""
        mixed, _ = self.linear_qkv(hidden)
        if self.shares_kv_heads:
            return self._shared_kv(all_gather_last_dim_from_tensor_parallel_region(mixed, self.tp_group))
        mixed = mixed.unflatten(-1, (-1, self.queries_per_kv + 2, self.config.head_dim))
        if self.queries_per_kv == 1:
            query, key, value = mixed.unbind(-2)
            return query, key, value
        query, key, value = mixed.split([self.queries_per_kv, 1, 1], dim=-2)
        return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)

    def _shared_kv(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select this rank's queries, and the one key-value head that they share, from the projection of all heads."""
        mixed = mixed.unflatten(-1, (self.config.num_kv_heads, self.queries_per_kv + 2, self.config.head_dim))
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        ranks_per_kv = tp // self.config.num_kv_heads
        mine = mixed[..., rank // ranks_per_kv, :, :]
        heads = self.queries_per_kv // ranks_per_kv
        start = rank % ranks_per_kv * heads
        return mine[..., start : start + heads, :], mine[..., -2:-1, :], mine[..., -1:, :]


def log_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, grouped: bool
) -> None:
    """Log which of torch's kernels attention uses, once for each kind of input.

    The unfused kernel, "math", keeps the scores of every layer for the backward pass. For long rows these exceed a
    GPU's memory.
    """
    scores = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    large = scores > LARGE_SCORES
    kind = (q.dtype, mask is not None, grouped, dropout > 0, large)
    if kind in _logged or q.device.type not in ("cpu", "cuda"):
        return
    _logged.add(kind)
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, dropout, causal, enable_gqa=grouped))
    name = choice.name.lower()
    parts = ["a mask"] * (mask is not None) + ["grouped heads"] * grouped + ["dropout"] * (dropout > 0)
    parts += ["long rows"] * large
    with_these = f" with {', '.join(parts)}" if parts else ""
    log.info("attention in %s%s: torch's kernel %s", str(q.dtype).removeprefix("torch."), with_these, name)
    if choice == SDPBackend.MATH and large:
        log.warning(
            "attention keeps %.1f GiB of scores a layer for rows of %s tokens, as no fused kernel supports them: "
            "use shorter rows, no packing (data.pack=false, ppo.pack=false) or trainer.precision=bf16",
            scores / 2**30,
            q.shape[2],
        )


def attend_by_distance(q: Tensor, k: Tensor, v: Tensor, added: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(q @ k.T + added) @ v, [batch, heads, time, head_dim] in float32 or wider.

    Args:
        q: [batch, heads, time, head_dim]; k and v: [batch, heads, keys, head_dim].
        added: [batch, heads, time, keys], mask and `values` together.
        values: [1, heads, time, keys], which have a gradient.
        dropout: rate at which weights are dropped.
    """
    mixed: Tensor = _AttendByDistance.apply(q, k, v, added, values, dropout)
    return mixed


class _AttendByDistance(torch.autograd.Function):
    """`attend_by_distance`.

    On a CPU, torch has no kernel for that gradient. Its single operations would keep two copies of queries and keys,
    and sum the gradient of the values over rows for every layer from a tensor of its own.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor, values: Tensor, dropout: float) -> Tensor:
        ctx.dtype, ctx.dropout = q.dtype, dropout
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys, vectors = (each.to(wide).flatten(0, 1).contiguous() for each in (q, k, v))
        scores = torch.bmm(queries, keys.transpose(1, 2))
        scores.view(added.shape).add_(added)
        weights = torch.softmax(scores, -1)
        used, kept = (weights, None) if dropout == 0.0 else torch.native_dropout(weights, dropout, True)
        ctx.save_for_backward(queries, keys, vectors, weights, kept)
        return torch.bmm(used, vectors).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, vectors, weights, kept = ctx.saved_tensors
        batch, heads = grads[0].shape[:2]
        grad = grads[0].flatten(0, 1)
        used = weights if kept is None else weights * kept / (1 - ctx.dropout)
        grad_vectors = torch.bmm(used.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, vectors.transpose(1, 2))
        if kept is not None:
            grad_weights.mul_(kept).div_(1 - ctx.dropout)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        del grad_weights
        grad_values = None
        if ctx.needs_input_grad[4]:
            grad_values = grad_scores.unflatten(0, (batch, heads)).sum(0, keepdim=True).to(ctx.dtype)
        grad_queries = torch.bmm(grad_scores, keys)
        grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries)
        found = (each.unflatten(0, (batch, heads)).to(ctx.dtype) for each in (grad_queries, grad_keys, grad_vectors))
        return *found, None, grad_values, None


def _few(special: bool) -> int:
    """Return the largest number of queries for which plain matrix products are used.

    With a GPU's settings, this is one if there is a mask or heads are grouped: fused kernels that do not support these
    copy the cache for every head, and other kernels are planned again for every length.
    """
    if device_settings().plain_attention:
        return SHORT
    return 1 if special else 0


def _attend_in_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute attention for few queries, [batch, heads, time, head_dim], to the same shape.

    It uses two batched products: for so few queries, torch's fused kernel takes up to twice as long on a CPU.
    """
    batch, heads, time, width = q.shape
    groups = k.shape[1]
    scaled = q if scale == 1.0 else q * scale
    queries = scaled.reshape(batch * groups, -1, width)  # a group's are adjacent
    scores = torch.bmm(queries, k.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        by_query = scores.view(batch, heads, time, -1)
        if not mask.is_floating_point():
            by_query = by_query.masked_fill(~mask, -torch.inf)
        elif torch.is_grad_enabled():
            by_query = by_query + mask
        else:
            by_query.add_(mask)
        scores = by_query.view(scores.shape)
    return torch.bmm(torch.softmax(scores, -1), v.flatten(0, 1)).view(q.shape)
