"""The layers of an encoder-decoder, as one stack over one tensor: first the encoder's layers, then the decoder's.

    hidden [time, batch, width]      e e e e | d d d        positions of the encoder, then those of the decoder

    encoder's layers                 change e
    decoder's layers                 change d, and attend from d to e

Each stage of a pipeline passes on the whole tensor, so that the decoder's stages have the encoder's states wherever the
stack is cut. Under sequence parallelism each rank has its share of both parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megarl.models.attention import Attention, Context, RelativePositions, buckets
from megarl.models.cache import CacheView
from megarl.models.config import GPTConfig
from megarl.models.kernels import kernels
from megarl.models.layer import Layer
from megarl.parallel.device import device_settings
from megarl.parallel.initialise import Std
from megarl.parallel.rows import ModelInputs


@dataclass
class Spans:
    """The inputs of the layers besides the hidden states; made once per forward pass of a chunk.

    Attributes:
        encoder, decoder: those of self-attention in each part.
        cross: mask of attention from the decoder to the encoder, [batch, 1, decoder's time, encoder's time].
        split: positions of the encoder in the hidden states that this rank has.
        cache: the encoder's keys and values of earlier passes.
    """

    encoder: Context
    decoder: Context
    cross: Tensor | None
    split: int
    cache: CacheView | None = None


class CrossAttention(Attention):
    """Attention from the decoder's positions to the encoder's."""

    def __init__(self, config: GPTConfig, layer_number: int, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        parts = kernels(config.kernels)
        width = config.head_dim * config.num_attention_heads

        def column(rows: int, name: str) -> nn.Module:
            made: nn.Module = parts.column(
                config.hidden_size,
                rows,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=config.add_qkv_bias,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name=name,
                tp_group=groups.tp,
            )
            return made

        self.linear_q, self.linear_kv = column(width, "q"), column(2 * width, "kv")
        self.linear_proj = parts.row(
            width,
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

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention output for hidden [time, batch, hidden] to keys and values of `project`."""
        query = self.linear_q(hidden)[0].unflatten(-1, (-1, self.config.head_dim)).permute(1, 2, 0, 3)
        output: Tensor = self.linear_proj(self.attend(query, keys, values, mask))[0]
        return output

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [batch, heads, time, head_dim] of this rank's heads for the encoder's states."""
        both = self.linear_kv(states)[0].unflatten(-1, (-1, 2, self.config.head_dim)).permute(1, 2, 0, 3, 4)
        return both[..., 0, :], both[..., 1, :]


class EncoderLayer(Layer):
    """A layer of the encoder. The last one ends with the encoder's norm."""

    def __init__(
        self,
        config: GPTConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, layer_number, pg_collection, vp_stage)
        add_positions(self, config, first=1, pg_collection=pg_collection)
        self.final_layernorm: nn.Module | None = None
        if self.layer_number == config.encoder_layers:
            norm = kernels(config.kernels).norm(config.normalization)
            self.final_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor, packed_seq_params: Spans, **_: object) -> tuple[Tensor, None]:  # type: ignore[override]
        """Change the encoder's part of hidden states [time, batch, hidden]."""
        split = packed_seq_params.split
        if split == 0:
            return hidden_states, None
        own, _none = super().forward(hidden_states[:split], packed_seq_params.encoder)
        if self.final_layernorm is not None:
            own = self._dropout(self.final_layernorm(own))
        return torch.cat([own, hidden_states[split:]]), None


class DecoderLayer(Layer):
    """A layer of the decoder: attention to the decoder's own earlier positions, to the encoder, and an MLP."""

    def __init__(
        self,
        config: GPTConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, layer_number, pg_collection, vp_stage)
        assert pg_collection is not None
        add_positions(self, config, first=config.encoder_layers + 1, pg_collection=pg_collection)
        norm = kernels(config.kernels).norm(config.normalization)
        self.pre_cross_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.cross_attention = CrossAttention(config, self.layer_number, pg_collection)

    def forward(self, hidden_states: Tensor, packed_seq_params: Spans, **_: object) -> tuple[Tensor, None]:  # type: ignore[override]
        """Change the decoder's part of hidden states [time, batch, hidden]."""
        spans = packed_seq_params
        states, own = hidden_states[: spans.split], hidden_states[spans.split :]
        if spans.cache is None:
            keys, values = self.cross_attention.project(states)
        elif spans.split:
            spans.cache.store_encoded(self.layer_number, *self.cross_attention.project(states))
            return hidden_states, None
        else:
            keys, values = spans.cache.encoded(self.layer_number)
        own = own + self._dropout(self.self_attention(self.input_layernorm(own), spans.decoder))
        crossed = self.cross_attention(self.pre_cross_layernorm(own), keys, values, spans.cross)
        own = own + self._dropout(crossed)
        assert self.pre_mlp_layernorm is not None
        own = own + self._dropout(self._mlp(self.pre_mlp_layernorm(own)))
        return (torch.cat([states, own]) if spans.split else own), None


def add_positions(layer: Layer, config: GPTConfig, *, first: int, pg_collection: ProcessGroupCollection | None) -> None:
    """Give the first layer of a part the table of relative positions that all layers of the part use."""
    assert pg_collection is not None
    if layer.layer_number != first or config.encoder is None:
        return
    heads = config.num_attention_heads // pg_collection.tp.size()
    table = nn.Parameter(torch.empty(config.encoder.buckets, heads))
    table.tensor_model_parallel, table.partition_dim, table.partition_stride = True, 1, 1  # type: ignore[attr-defined]
    layer.self_attention.relative_positions = table


def layer_of(config: GPTConfig, number: int) -> type[Layer]:
    """Return the class of a layer by its number in the whole model, from 1."""
    if config.encoder is None:
        return Layer
    return EncoderLayer if number <= config.encoder_layers else DecoderLayer


def spans(
    inputs: ModelInputs, config: GPTConfig, tables: tuple[Tensor | None, Tensor | None], cache: CacheView | None
) -> Spans:
    """Return the inputs of the layers for the inputs of a model.

    Args:
        tables: relative positions of the encoder and of the decoder, where this stage has layers of theirs.
        cache: of generation; then the pass is over prompts alone, or over single tokens of the decoder.
    """
    assert config.encoder is not None
    settings, dtype, device = config.encoder, config.params_dtype, inputs.tokens.device
    nothing = Context(None, None)

    def relative(table: Tensor | None, distance: Tensor, *, both_sides: bool) -> RelativePositions | None:
        if table is None:
            return None
        return RelativePositions(
            table, buckets(distance, settings.buckets, settings.longest_distance, both_sides=both_sides)
        )

    def of_part(table: Tensor | None, distance: Tensor, mask: Tensor, *, both_sides: bool) -> Context:
        positions = relative(table, distance, both_sides=both_sides)
        if positions is not None and layers_share_positions(config):
            positions = positions.shared(mask, dtype)
        return Context(None, mask, relative=positions)

    encoder, split = nothing, 0
    ids = None
    if inputs.encoder is not None:
        ids = inputs.encoder.segment_ids
        assert ids is not None
        split = ids.shape[1]
        index = torch.arange(split, device=device)
        # Padding is a document of its own, so that no softmax is over an empty set.
        mask = added(ids[:, None, :, None] == ids[:, None, None, :], dtype)
        encoder = of_part(tables[0], index[None, None, :] - index[:, None], mask, both_sides=True)
    if cache is not None and split == 0:
        return Spans(nothing, _decoding(cache, config, tables[1], relative), cache.encoded_mask(), 0, cache)
    if cache is not None:
        return Spans(encoder, nothing, None, _share(split, config), cache)
    assert ids is not None
    time = inputs.tokens.shape[1]
    index = torch.arange(time, device=device)
    distance = index[None, :] - index[:, None]
    segments = inputs.segment_ids
    mine = torch.ones(inputs.tokens.shape, dtype=torch.long, device=device) if segments is None else segments
    within = (mine[:, :, None] == mine[:, None, :])[:, None]
    causal = added(within & (distance <= 0), dtype)
    # Padding of the decoder attends to everything, so that no softmax is over an empty set.
    crossed = (mine[:, :, None] == ids[:, None, :]) | (mine == 0)[:, :, None]
    decoder = of_part(tables[1], distance[None], causal, both_sides=False)
    return Spans(encoder, decoder, added(crossed[:, None], dtype), _share(split, config))


def layers_share_positions(config: GPTConfig) -> bool:
    """Return whether one look-up of relative positions serves all layers of a pass: on a CPU, unless layers are
    recomputed whole (see `RelativePositions`)."""
    recomputes = config.recompute_granularity == "full" and torch.is_grad_enabled()
    return device_settings().plain_attention and not recomputes


def _decoding(cache: CacheView, config: GPTConfig, table: Tensor | None, relative: object) -> Context:
    """Return the inputs of self-attention for single tokens after those in the cache. The mask contains the relative
    positions: without gradients, one look-up serves all layers, and all rows if their tokens are at one position."""
    assert cache.length is not None
    assert callable(relative)
    entries = torch.arange(cache.length, device=cache.positions.device)
    different = cache.positions[:1] if cache.even else cache.positions
    distance = entries[None, None, :] - different[:, :, None]
    mask, positions = cache.mask(config.sliding_window), relative(table, distance, both_sides=False)
    return Context(None, mask if positions is None else positions.add_to(mask, config.params_dtype), cache)


def added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores: 0 where attention is allowed, else minus infinity."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _share(time: int, config: GPTConfig) -> int:
    """Return how many of a part's positions this rank's hidden states have."""
    return time // config.tensor_model_parallel_size if config.sequence_parallel else time


def with_start(inputs: ModelInputs, start: int) -> ModelInputs:
    """Return the inputs with the start token where a row of the decoder begins."""
    return replace(inputs, tokens=inputs.tokens.masked_fill(inputs.positions == 0, start))


def initial_std(name: str, config: GPTConfig) -> Std:
    """Return the standard deviation of a weight's initial values, as T5 starts.

    Each weight has that of a layer whose outputs are as large as its inputs. Queries have less, by the root of a head's
    width, as scores are not divided by it. States are as large as the embeddings, 1, until the output layer, whose
    logits begin as large.
    """
    assert config.encoder is not None
    inputs = config.hidden_size
    output = 1.0 if config.encoder.scale_outputs else inputs**-0.5
    if name.startswith("embedding."):
        return output if config.tie_embeddings else 1.0
    if name.startswith("output_layer."):
        return output
    narrow = float((inputs * config.head_dim) ** -0.5)
    if name.endswith("linear_q.weight"):
        return narrow
    if name.endswith("linear_qkv.weight"):  # by head: its query, its key, its value
        parts = torch.tensor([narrow, inputs**-0.5, inputs**-0.5]).repeat_interleave(config.head_dim)
        return parts.repeat(config.num_attention_heads)[:, None]
    if name.endswith("linear_proj.weight"):
        inputs = config.head_dim * config.num_attention_heads
    elif name.endswith("linear_fc2.weight"):
        inputs = config.ffn_hidden_size
    return float(inputs**-0.5)
