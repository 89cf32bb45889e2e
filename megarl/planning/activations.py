"""Bytes of activations: what a layer keeps for the backward pass, and what is allocated temporarily.

The formulas are derived for megarl's own layer in docs/planning.md, after Korthikanti et al. (2022); tests compare them
with what autograd keeps. `tokens` is the number of tokens of one microbatch, micro batch size x length.
"""

from dataclasses import dataclass

from megarl.models.config import GPTConfig
from megarl.parallel.layout import Layout
from megarl.parallel.vocab import CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU, padded_vocab


@dataclass(frozen=True)
class Shape:
    """Widths of one rank's slice of a layer, in elements per token, and the bytes of an element."""

    hidden: float  # of the residual stream: a tp-th of the tokens under sequence parallelism
    whole: int  # of the residual stream with all tokens
    queries: float
    keys: float  # of one of keys and values
    heads: float
    inner: float  # of the MLP
    rotary: int
    element: int
    gathered: bool
    on_cpu: bool

    @classmethod
    def of(cls, config: GPTConfig, layout: Layout, element: int, *, on_cpu: bool) -> "Shape":
        """Compute the widths for a configuration and a layout; `element` is in bytes."""
        tp = layout.tp
        split = tp if layout.sequence_parallel else 1
        return cls(
            hidden=config.hidden_size / split,
            whole=config.hidden_size,
            queries=config.num_attention_heads * config.head_dim / tp,
            keys=max(1.0, config.num_kv_heads / tp) * config.head_dim,
            heads=config.num_attention_heads / tp,
            inner=config.ffn_hidden_size / tp,
            rotary=config.rotary_dim if config.position == "rope" else 0,
            element=element,
            gathered=layout.sequence_parallel,
            on_cpu=on_cpu,
        )


def kept_by_norm(config: GPTConfig, shape: Shape, *, inputs: bool = True) -> float:
    """Return bytes per token of a norm: its input, its statistics, and its output, which the next product keeps."""
    split = shape.whole / shape.hidden
    output = shape.hidden * shape.element
    if config.normalization == "LayerNorm":
        return output + (shape.hidden * shape.element if inputs else 0.0) + 2 * shape.element / split
    if shape.on_cpu:  # several float32 operations: they keep the input and the input over its root mean square
        return output + 2 * shape.hidden * 4 - (0.0 if inputs else shape.hidden * 4) + 4 / split
    return output + (shape.hidden * shape.element if inputs else 0.0) + 4 / split


def kept_by_layer(config: GPTConfig, shape: Shape, recompute: str) -> float:
    """Return the bytes per token that one layer keeps from its forward to its backward pass."""
    if recompute == "full":
        return shape.hidden * shape.element
    norms = 1 if config.parallel_residual == "one_norm" else 2
    total = norms * kept_by_norm(config, shape)
    if config.parallel_residual == "two_norms" and (config.normalization == "LayerNorm" or not shape.on_cpu):
        total -= shape.hidden * shape.element  # both norms keep the same input
    total += _kept_by_attention(config, shape, recompute) + _kept_by_mlp(config, shape)
    if config.hidden_dropout > 0:
        total += 2 * shape.hidden  # one byte per element of two masks
    return total


def _kept_by_attention(config: GPTConfig, shape: Shape, recompute: str) -> float:
    """Return bytes per token of the projection (whose slice is the values), queries, keys, output and statistics."""
    vectors = shape.queries + shape.keys
    # Queries of several groups are not contiguous in the projection, so they are copied.
    copied = config.num_kv_heads != config.num_attention_heads and shape.keys > config.head_dim
    elements = 2 * shape.queries + 2 * shape.keys  # the projection, and the output
    if config.position == "rope" or config.qk_layernorm:
        elements += vectors
    elif copied:
        elements += shape.queries
    statistics = 0.0 if recompute == "selective" else 4 * shape.heads
    if config.qk_layernorm:
        single = shape.on_cpu and config.normalization == "RMSNorm"  # as in `kept_by_norm`
        statistics += vectors / config.head_dim * (4 if config.normalization == "RMSNorm" else 2 * shape.element)
        if single:
            statistics += vectors * (4 if shape.element == 4 else 8)
        if copied and not (single and shape.element < 4):
            elements += shape.queries
    return elements * shape.element + statistics


def _kept_by_mlp(config: GPTConfig, shape: Shape) -> float:
    """Return bytes per token of the inputs of activation and second product; gated: halves, factors and product."""
    return (5 if config.gated_linear_unit else 2) * shape.inner * shape.element


def passing_forward(config: GPTConfig, shape: Shape) -> float:
    """Return the peak bytes per token during one layer's forward pass, when nothing is kept."""
    wide = shape.element if not shape.on_cpu or shape.element == 4 else 4
    gathered = shape.whole if shape.gathered else 0.0
    attention = 2 * shape.hidden + gathered + 4 * shape.queries + 4 * shape.keys
    # Seven: the embedding's output, the layer's input, input and output of attention, their sum, its norm, one spare.
    mlp = 7 * shape.hidden + gathered + (5 if config.gated_linear_unit else 2) * shape.inner
    norm = 2 * shape.hidden * shape.element + 3 * shape.hidden * wide
    return max(attention * shape.element, mlp * shape.element, norm)


def passing_backward(config: GPTConfig, shape: Shape) -> float:
    """Return the peak bytes per token during one layer's backward pass, in addition to what is kept.

    The peak is in the MLP: what a step allocates replaces what the next step had kept.
    """
    gathered = shape.whole if shape.gathered else 0.0
    mlp = (2 if config.gated_linear_unit else 1) * shape.inner
    return (shape.hidden + gathered + max(mlp, shape.queries)) * shape.element


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
        if not shape.on_cpu or narrow:  # the weight's gradient is summed in float32 before autograd receives it
            total += columns * width * (4 + shape.element)
    return total
