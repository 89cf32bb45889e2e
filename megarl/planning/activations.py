"""Bytes of activations: what a layer keeps for the backward pass, and what is allocated temporarily.

The formulas are derived for megarl's own layers in docs/planning.md, after Korthikanti et al. (2022); tests compare
them with what autograd keeps.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from megarl.models.adapter_spec import CROSS_LINEARS, LINEARS, SHARED_LINEARS, Parts
from megarl.models.config import GPTConfig
from megarl.parallel.layout import Layout
from megarl.parallel.quantised import CPU_CHUNK, GPU_CHUNK
from megarl.parallel.vocab import CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU, padded_vocab
from megarl.planning.parts import Part, Positions

QKV, PROJ, FC1, FC2 = LINEARS["linear_qkv"], LINEARS["linear_proj"], LINEARS["linear_fc1"], LINEARS["linear_fc2"]
CROSS_Q, CROSS_KV, CROSS_PROJ = CROSS_LINEARS
SHARED_FC1, SHARED_FC2 = SHARED_LINEARS.values()
ROW_PARALLEL = (PROJ, FC2, CROSS_PROJ, SHARED_FC2)


@dataclass(frozen=True)
class Shape:
    """Widths of one rank's slice of a layer, in elements per token, and the bytes of an element."""

    hidden: float  # of the residual stream: a tp-th of the tokens under sequence parallelism
    whole: int  # of the residual stream with all tokens
    queries: float
    keys: float  # of one of keys and values
    heads: float
    inner: float  # of the MLP
    expert: float  # inner width of an expert
    shared: float  # of the MLP that computes every token beside the experts; 0 without one
    copies: int  # how many experts a token is sent to
    all_experts: int  # of a layer
    experts: int  # of a layer, on this rank
    rotary: int
    element: int
    gathered: bool
    on_cpu: bool

    @classmethod
    def of(cls, config: GPTConfig, layout: Layout, element: int, *, on_cpu: bool) -> "Shape":
        """Compute the widths for a configuration and a layout; `element` is in bytes."""
        tp = layout.tp
        split = tp if layout.sequence_parallel else 1
        count = 0 if config.experts is None else int(config.experts.count or 0)
        return cls(
            hidden=config.hidden_size / split,
            whole=config.hidden_size,
            queries=config.num_attention_heads * config.head_dim / tp,
            keys=max(1.0, config.num_kv_heads / tp) * config.head_dim,
            heads=config.num_attention_heads / tp,
            inner=config.ffn_hidden_size / tp,
            expert=config.expert_width / tp,
            shared=(0 if config.experts is None else config.experts.shared_ffn_size or 0) / tp,
            copies=0 if config.experts is None else config.experts.chosen,
            all_experts=count,
            experts=count // layout.ep,
            rotary=config.rotary_dim if config.position == "rope" else 0,
            element=element,
            gathered=layout.sequence_parallel,
            on_cpu=on_cpu,
        )


def kept_by_norm(config: GPTConfig, shape: Shape, *, outputs: bool = True) -> float:
    """Return bytes per token of a norm: its input, its statistics, and its output if the next product keeps it."""
    split = shape.whole / shape.hidden
    output = shape.hidden * shape.element if outputs else 0.0
    if config.normalization == "LayerNorm":
        return output + shape.hidden * shape.element + 2 * shape.element / split
    if _converts(config, shape):  # several float32 operations: they keep the input and, for the scale, its factor
        return output + (1 if config.adapter else 2) * shape.hidden * 4 + 4 / split
    return output + shape.hidden * shape.element + 4 / split


def kept_by_layer(config: GPTConfig, shape: Shape, at: Positions, recompute: str) -> float:
    """Return the bytes that one layer keeps from its forward to its backward pass over positions `at`."""
    if recompute == "full":
        return at.whole * shape.hidden * shape.element
    total = at.tokens * _kept_per_token(config, shape, at, recompute) + _kept_by_adapters(config, shape, at)
    total += at.bins * _kept_of_others(config, shape, at)
    if at.routed and shape.element < 4:  # the router's weight in float32
        total += 4 * shape.all_experts * shape.whole
    if config.position == "relative" and recompute != "selective":
        dropped = 1 if _in_operations(config, shape) and config.attention_dropout > 0 else 0  # a byte of a mask
        total += at.tokens * at.time * shape.heads * (_per_pair(config, shape) + dropped)
    if at.crosses:
        total += at.bins * _kept_by_cross_attention(config, shape, at, recompute)
    return total


def _kept_per_token(config: GPTConfig, shape: Shape, at: Positions, recompute: str) -> float:
    """Return the bytes per token that attention to the own sequence, the MLP and their norms keep."""
    read = [_keeps_input(config, at, QKV), _keeps_normed(config, shape, at)]
    if config.parallel_residual == "one_norm":
        total = kept_by_norm(config, shape, outputs=any(read))
    else:
        total = sum(kept_by_norm(config, shape, outputs=kept) for kept in read)
    if config.parallel_residual == "two_norms" and not _converts(config, shape):
        total -= shape.hidden * shape.element  # both norms keep the same input
    total += _kept_by_attention(config, shape, at, recompute)
    total += _kept_by_experts(config, shape, at) if at.routed else _kept_by_mlp(config, shape, at)
    if config.hidden_dropout > 0:
        total += 2 * shape.hidden  # one byte per element of two masks
    return total


def _in_operations(config: GPTConfig, shape: Shape) -> bool:
    """Return whether attention with relative positions consists of single operations in float32: on a CPU, which has no
    kernel for the gradient of these positions."""
    return shape.on_cpu and config.position == "relative"


def _per_pair(config: GPTConfig, shape: Shape) -> int:
    """Return the bytes that attention with relative positions keeps for a query, a key and a head: their value, which
    is added to the score, or in single operations the weight."""
    return 4 if _in_operations(config, shape) else shape.element


def _kept_of_others(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return bytes per bin of the positions that a layer passes on: what is kept of its own is a view of all."""
    width = shape.hidden * shape.element
    read = at.crosses and _keeps_input(config, at, CROSS_KV)  # for keys and values of the others
    dropped = read and config.adapter is not None and config.adapter.dropout > 0  # a copy with dropout is kept instead
    kept = at.other * width if dropped else 0.0
    if not _converts(config, shape):
        return kept + at.other * width
    # The norm's input in float32 is a copy of the own positions.
    return kept if dropped or not read else (at.time + at.other) * width


def _converts(config: GPTConfig, shape: Shape) -> bool:
    """Return whether a norm keeps copies of its input instead of the input itself (`kept_by_norm`)."""
    return shape.on_cpu and shape.element < 4 and config.normalization == "RMSNorm"


def _kept_by_cross_attention(config: GPTConfig, shape: Shape, at: Positions, recompute: str) -> float:
    """Return bytes per bin of the norm, queries, output and statistics of a decoder's positions, and of keys and values
    of the encoder's."""
    norm = kept_by_norm(config, shape, outputs=_keeps_input(config, at, CROSS_Q))
    statistics = 0.0 if recompute == "selective" else 4 * shape.heads
    own = norm + 2 * shape.queries * shape.element + statistics
    if config.hidden_dropout > 0:
        own += shape.hidden  # a byte per element of a mask
    return at.time * own + at.other * 2 * shape.keys * shape.element


def _kept_by_attention(config: GPTConfig, shape: Shape, at: Positions, recompute: str) -> float:
    """Return bytes per token of the projection (whose slice is the values), queries, keys, output and statistics."""
    vectors = shape.queries + shape.keys
    if _in_operations(config, shape) and recompute != "selective":
        # They keep copies of queries, keys and values instead of the projection, and leave the output to its product.
        dropped = config.adapter is not None and config.adapter.dropout > 0  # the product keeps a copy with dropout
        output = shape.queries * shape.element if _keeps_input(config, at, PROJ) and not dropped else 0.0
        return (vectors + shape.keys) * 4 + output
    if at.ranks > 1:
        return _kept_by_sliced_attention(config, shape, at)
    copied = _copies_queries(config, shape)
    elements = 2 * shape.queries + 2 * shape.keys  # the projection, and the output
    if config.position == "rope" or config.qk_layernorm:
        elements += vectors
    elif copied:
        elements += shape.queries
    statistics = 0.0 if recompute == "selective" else 4 * shape.heads
    if config.qk_layernorm:
        statistics += _kept_by_qk_norm(config, shape)
        if copied and not _converts(config, shape):
            elements += shape.queries
    return elements * shape.element + statistics


def _copies_queries(config: GPTConfig, shape: Shape) -> bool:
    """Return whether queries are copied out of the projection: those of several groups are not contiguous in it."""
    return config.num_kv_heads != config.num_attention_heads and shape.keys > config.head_dim


def _kept_by_qk_norm(config: GPTConfig, shape: Shape) -> float:
    """Return bytes per token of the norms of queries and keys, besides inputs that are views of the projection."""
    vectors = shape.queries + shape.keys
    statistics = vectors / config.head_dim * (4 if config.normalization == "RMSNorm" else 2 * shape.element)
    if _converts(config, shape):
        statistics += vectors * (4 if config.adapter else 8)  # the input, and what the scale multiplies
    return statistics


def _kept_by_sliced_attention(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return bytes per token of attention to keys of several ranks: queries, a copy of the own keys and values, outputs
    of both slices, their concatenation, and statistics. Nothing is recomputed selectively.

    The projection is kept where queries, or the inputs of norms, are views of it.
    """
    projection, queries = shape.queries + 2 * shape.keys, shape.queries
    copied = _copies_queries(config, shape)
    dropped = config.adapter is not None and config.adapter.dropout > 0  # the product keeps a copy with dropout
    joined = queries if _keeps_input(config, at, PROJ) and not dropped else 0.0
    elements = 2 * shape.keys + queries + joined
    if config.qk_layernorm and not _converts(config, shape):
        elements += projection + queries * (1 + copied)
    elif config.position == "rope" or config.qk_layernorm or copied:
        elements += queries
    else:
        elements += projection
    statistics = 4 * shape.heads + (_kept_by_qk_norm(config, shape) if config.qk_layernorm else 0.0)
    return elements * shape.element + statistics


def _kept_by_mlp(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return bytes per token of the inputs of activation and second product; gated: halves, factors and product. ReLU
    keeps its output, which is that input."""
    if config.activation_func is F.relu:
        return shape.inner * shape.element
    widths = (4 if config.gated_linear_unit else 1) + _keeps_input(config, at, FC2)
    return widths * shape.inner * shape.element


def _keeps_normed(config: GPTConfig, shape: Shape, at: Positions) -> bool:
    """Return whether the output of the norm before an MLP or experts is kept. A router keeps it in float32; experts
    keep copies, and a shared expert keeps it itself."""
    if not at.routed:
        return _keeps_input(config, at, FC1)
    router = config.adapter is None and shape.element == 4
    return router or (shape.shared > 0 and _keeps_input(config, at, SHARED_FC1))


def _kept_by_experts(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return bytes per token of router, experts and shared expert. Under sequence parallelism, every rank has its slice
    of the experts for all tokens, but router, gate and a shared expert's results for its own tokens."""
    assert config.experts is not None
    trained = config.adapter is None
    copies, split = shape.copies, shape.whole / shape.hidden
    router = 4 * shape.all_experts + copies * (4 + 8)  # scores; weights and numbers of the experts
    if config.experts.balance > 0 or config.experts.z_loss > 0:
        router += 3 * 4 * shape.all_experts + 5
    if not config.experts.normalise:
        router += 4
    if trained and shape.element < 4:
        router += 4 * shape.whole
    sent = copies * (2 * 8 + shape.element)  # order, places, and weights
    sent += copies * (3 if trained else 2) * shape.whole * shape.element  # inputs, results, and these times weights
    return (
        router / split
        + sent
        + copies * _kept_inside(config, 3, product=trained) * shape.expert * shape.element
        + _kept_by_shared(config, shape, at)
    )


def _kept_inside(config: GPTConfig, gated: int, *, product: bool) -> int:
    """Return how many inner widths an expert keeps: `gated` of them for a gate, and the input of its second product."""
    if config.activation_func is F.relu:
        return 1
    return (gated if config.gated_linear_unit else 1) + product


def _kept_by_shared(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return bytes per token of a shared expert: of its MLP, what it returns, and the gate."""
    if shape.shared == 0:
        return 0.0
    inner = _kept_inside(config, 4, product=_keeps_input(config, at, SHARED_FC2)) * shape.shared
    return (inner + shape.hidden + shape.hidden / shape.whole) * shape.element


def _adapted(config: GPTConfig, at: Positions) -> dict[str, Parts]:
    """Return the adapted parts of a layer with adapters, by their places in it."""
    if config.adapter is None:
        return {}
    is_encoder = config.encoder is not None and not at.crosses
    last = config.encoder_layers if is_encoder else config.num_layers
    if config.experts is not None:  # the last of the layers that have experts, or have none, as this one
        last = max(number for number in range(1, last + 1) if config.has_experts(number) == at.routed)
    return config.adapter.at(last - 1)


def _keeps_input(config: GPTConfig, at: Positions, place: str) -> bool:
    """Return whether a linear layer's input is kept: for the gradient of its weight, or of its adapter's `down`."""
    return config.adapter is None or place in _adapted(config, at)


def _outputs(config: GPTConfig, shape: Shape, at: Positions) -> dict[str, float]:
    """Return the width of the output of each linear layer with an adapter, per token that it reads."""
    widths = {
        QKV: shape.queries * (1 + 2 * config.num_kv_heads / config.num_attention_heads),
        PROJ: shape.hidden,
        FC1: (2 if config.gated_linear_unit else 1) * shape.inner,
        FC2: shape.hidden,
        SHARED_FC1: (2 if config.gated_linear_unit else 1) * shape.shared,
        SHARED_FC2: shape.hidden,
        CROSS_Q: shape.queries,
        CROSS_KV: 2 * shape.keys,
        CROSS_PROJ: shape.hidden,
    }
    return {place: widths[place] for place in _adapted(config, at)}


def _kept_by_adapters(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return bytes of what a layer's adapters keep besides their inputs: what `down` returns, with DoRA the outputs of
    the frozen weights, and with dropout a mask and a second input of the attention's output layer."""
    spec, adapted, total = config.adapter, _adapted(config, at), 0.0
    if spec is None:
        return total
    inputs = {PROJ: shape.queries, CROSS_PROJ: shape.queries, FC2: shape.inner, SHARED_FC2: shape.shared}
    for place, width in _outputs(config, shape, at).items():
        split = shape.whole / shape.hidden if place in ROW_PARALLEL else 1.0
        kept = len(adapted[place].modules) * spec.rank / split * shape.element
        if spec.kind == "dora":
            kept += width * shape.element
        if spec.dropout > 0:
            kept += inputs.get(place, shape.hidden) * (shape.element if shape.on_cpu else 1)
            kept += shape.queries * shape.element if place in (PROJ, CROSS_PROJ) else 0.0
        total += kept * (at.bins * at.other if place == CROSS_KV else at.tokens)
    if spec.dropout > 0 and config.parallel_residual == "one_norm" and {QKV, FC1} <= set(adapted):
        total += at.tokens * shape.hidden * shape.element  # one output of a norm, but two inputs with dropout
    return total


def kept_once_by_adapters(config: GPTConfig, layout: Layout, shape: Shape, at: Positions) -> float:
    """Return the bytes that a layer's adapters keep for any number of tokens: `up` times the scaling, and with DoRA
    that times the factors of the rows, and three vectors of numbers per row."""
    spec, total = config.adapter, 0.0
    for place, parts in _adapted(config, at).items():
        assert spec is not None
        rows = parts.count / (1 if place in ROW_PARALLEL else layout.tp)
        columns = len(parts.modules) * spec.rank
        total += rows * (2 * columns + 3 if spec.kind == "dora" else columns)
    return total * shape.element


def not_kept_by_first(config: GPTConfig, shape: Shape, at: Positions) -> float:
    """Return the bytes of its input that the first layer with adapters of a model does not keep, as nothing below it
    trains."""
    norms = 2 if config.parallel_residual == "two_norms" else 1
    single = norms == 2 and not _converts(config, shape)  # both keep the same input
    shared = shape.hidden * shape.element if single else 0.0
    others = 0.0 if at.crosses else at.bins * _kept_of_others(config, shape, at)
    return at.tokens * (norms * kept_by_norm(config, shape, outputs=False) - shared) + others


def kept_besides_layers(config: GPTConfig, shape: Shape, part: Part, recompute: str) -> float:
    """Return the bytes that the layers of an encoder-decoder's part share, and those of the norm after an encoder.

    All layers read the buckets of distances, 8 bytes each, and the mask to the encoder. Masks within a part are needed
    again where attention is recomputed; on a CPU, they then contain the relative positions of every head.
    """
    if config.position != "relative" or not part.trained:
        return 0.0
    at = part.at
    masked = (at.other if at.crosses else 0) + (at.time if recompute != "none" else 0)
    total = 8.0 * at.time**2 + at.tokens * masked * shape.element
    if recompute == "selective" and _in_operations(config, shape):
        total += (at.bins * (shape.heads - 1) + shape.heads) * at.time**2 * shape.element
    if part.is_last and recompute != "full":
        total += at.tokens * kept_by_norm(config, shape, outputs=False)
    return total


def passing_forward(config: GPTConfig, shape: Shape, at: Positions, *, adapters: bool = True) -> float:
    """Return the peak bytes during one layer's forward pass over positions `at`, when nothing is kept.

    Args:
        config: the model.
        shape: widths of a rank's slice.
        at: the positions.
        adapters: whether the layer's adapters compute; they do not while they are merged into the weights.
    """
    wide = shape.element if not shape.on_cpu or shape.element == 4 else 4
    gathered = shape.whole if shape.gathered else 0.0
    attention = 2 * shape.hidden + gathered + 4 * shape.queries + 4 * shape.keys
    if at.ranks > 1:
        attention = 2 * shape.hidden + gathered + _passing_sliced_attention(config, shape, at, wide)
    # Seven: the embedding's output, the layer's input, input and output of attention, their sum, its norm, one spare.
    mlp = 7 * shape.hidden + gathered
    mlp += _passing_experts(config, shape) if at.routed else (5 if config.gated_linear_unit else 2) * shape.inner
    norm = 2 * shape.hidden * shape.element + 3 * shape.hidden * wide
    outputs = _outputs(config, shape, at)
    if adapters and outputs:  # outputs of the weight and of the adapter, and their sum; with DoRA one more
        copies = 4 if config.adapter is not None and config.adapter.kind == "dora" else 3
        attention = max(attention, 2 * shape.hidden + gathered + copies * outputs.get(QKV, 0.0))
        mlp = max(mlp, 7 * shape.hidden + gathered + copies * outputs.get(FC1, 0.0))
    # A value for every pair and head of each bin, and once for all distances. Single operations add it to the scores.
    pairs = (at.bins + 1) * at.time**2 * shape.heads * shape.element if config.position == "relative" else 0.0
    if _in_operations(config, shape):
        pairs += at.bins * at.time**2 * shape.heads * 4
    others = at.bins * at.other * 2 * shape.hidden * shape.element  # the embedding's output and the layer's input
    if at.crosses:
        others += at.bins * at.other * 2 * shape.keys * shape.element
    if config.position == "relative":  # masks within and between the parts, and buckets of distances
        squares = at.time**2 + at.other**2
        others += at.bins * (squares + at.time * at.other) * shape.element + 8 * squares
    return max(at.tokens * attention * shape.element + pairs, at.tokens * max(mlp * shape.element, norm)) + others


def _passing_sliced_attention(config: GPTConfig, shape: Shape, at: Positions, wide: int) -> float:
    """Return the elements per token at the peak of attention to keys of several ranks.

    Beside the projection, rotated queries and keys, and the own keys and values in one tensor, these are the gathered
    keys and values: twice while the parts of the ranks are joined. Then there are the early slice's output and, on a
    CPU, both parts of the late slice's with their products in at least float32, and their sum.
    """
    rotated = config.position == "rope" or config.qk_layernorm
    own = (1 + (rotated or _copies_queries(config, shape))) * shape.queries + (4 + rotated) * shape.keys
    whole = 2 * shape.keys * at.ranks
    outputs = (1.5 + 1.5 * wide / shape.element if shape.on_cpu else 1.0) * shape.queries
    return own + whole + max(whole, outputs)


def _passing_experts(config: GPTConfig, shape: Shape) -> float:
    """Return the elements per token at the peak of a forward pass through experts that keeps nothing.

    Copies of the tokens are held as they are sent, received and sorted by expert, and results likewise; before these
    are joined, one expert's inner states are there.
    """
    sent, inner = shape.copies * shape.whole, shape.copies * shape.expert / shape.experts
    before, whole = (3, 6) if shape.experts < shape.all_experts else (1, 3)
    return max(whole * sent, (before + 1) * sent + (4 if config.gated_linear_unit else 2) * inner)


def passing_backward(config: GPTConfig, shape: Shape, at: Positions, recompute: str) -> float:
    """Return the peak bytes during one layer's backward pass over positions `at`, in addition to what is kept.

    The peak is in the MLP: what a step allocates replaces what the next step had kept. With relative positions it may
    be in attention, whose gradients have a value for every query, key and head, after what the MLP kept is freed.
    """
    gathered = shape.whole if shape.gathered else 0.0
    mlp = (2 if config.gated_linear_unit else 1) * shape.inner
    if at.routed:  # gradients of results and of weights; where tokens are elsewhere, more in the forward pass before it
        mlp = (3 if shape.experts < shape.all_experts else 2) * shape.copies * shape.whole
    total = (shape.hidden + gathered + max(mlp, shape.queries)) * shape.element
    if config.adapter is not None and config.adapter.base_bits < 16 and shape.element < 4:
        total += 4 * shape.inner  # a quantised weight's input gradient is summed in float32
    total *= at.tokens
    if at.ranks > 1:
        # Gathered keys and values, their gradients summed and of one slice, and those of its keys alone; of the own
        # positions, the gradient of the layer's input. The MLP's part is freed, and gradients of outputs and queries
        # are in the place of what the output's product and the late slice had kept.
        replaced = 0.0 if _keeps_input(config, at, PROJ) else shape.queries
        sliced = (shape.hidden + replaced + 7 * shape.keys * at.ranks) * shape.element
        freed = _kept_by_experts(config, shape, at) if at.routed else _kept_by_mlp(config, shape, at)
        if config.parallel_residual != "one_norm":  # else its norm is attention's, too
            freed += kept_by_norm(config, shape)
        if config.parallel_residual == "two_norms" and not _converts(config, shape):
            freed -= shape.hidden * shape.element  # both norms keep the same input
        return max(total, at.tokens * (sliced - freed))
    if config.position != "relative":
        return total
    one = at.time**2 * shape.heads * _per_pair(config, shape)  # a value for every pair and head of a bin
    # The gradient for all bins, its sum over bins, and a copy by distance; before these two, that of single operations.
    gradients = one * (max(2 * at.bins, at.bins + 2) if shape.on_cpu else at.bins + 2)
    if config.adapter is not None:  # positions are frozen; single operations have the gradients of weights and scores
        gradients = 2.0 * at.bins * one if _in_operations(config, shape) else 0.0
    if recompute == "selective":
        gradients += one * at.bins
    freed = at.tokens * (_kept_by_mlp(config, shape, at) + kept_by_norm(config, shape))
    freed += at.bins * _kept_by_cross_attention(config, shape, at, recompute) if at.crosses else 0.0
    return max(total, gradients - freed + at.tokens * (2 * shape.hidden + 2 * shape.queries) * shape.element)


def dequantised_chunk(config: GPTConfig, shape: Shape) -> float:
    """Return the bytes that a product with a quantised weight allocates for a part of that weight."""
    if config.adapter is None or config.adapter.base_bits == 16:
        return 0.0
    widest = shape.whole * max(shape.inner * (2 if config.gated_linear_unit else 1), shape.queries + 2 * shape.keys)
    values = min(widest, CPU_CHUNK if shape.on_cpu else GPU_CHUNK)
    looked_up = 4 if config.adapter.base_bits == 8 else 4 + 2  # float32 values, and indices of pairs in 4 bytes
    return values * (looked_up + (shape.element if shape.element < 4 else 0))


def logits_chunk(rows: int, columns: int, *, on_cpu: bool) -> int:
    """Return the number of logits in memory at once: `vocab_stats` splits the rows evenly into chunks."""
    budget = CHUNK_ELEMENTS_CPU if on_cpu else CHUNK_ELEMENTS_GPU
    count = max(1, -(-rows // max(1, budget // columns)))
    return -(-rows // count) * columns


def vocabulary(
    config: GPTConfig, shape: Shape, layout: Layout, rows: int, *, backward: bool, entropy: bool, width: int
) -> float:
    """Return the bytes at the output layer (or a Q head) for `rows` positions, including a chunk of logits.

    `width` is the width of the states: the model's, or twice that for a head.
    """
    columns = padded_vocab(config.vocab_size, layout.tp) // layout.tp
    chunk = logits_chunk(rows, columns, on_cpu=shape.on_cpu)
    total = rows * (3 * 4 * 2 + 8.0)  # statistics of every position, in float32
    narrow = shape.element < 4
    total += chunk * (shape.element + (4 if narrow else 0))
    if entropy:
        total += chunk * (8 if backward else 4)
    if backward:
        total += rows * width * shape.element  # the states' gradient
        total += chunk * shape.element if narrow else 0
        if (not shape.on_cpu or narrow) and (
            config.adapter is None or width != shape.whole
        ):  # the weight's gradient is summed in float32 before autograd receives it
            total += columns * width * (4 + shape.element)
    return total
