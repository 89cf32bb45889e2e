"""One pipeline stage of a GPT, or of an encoder-decoder, that returns hidden states, and the log-probs and values
computed from them."""

from collections import Counter
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from torch.nn import functional as F

from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import attach, fill, quantised_linears
from megarl.models.attention import Context, attention_mask
from megarl.models.cache import CacheView
from megarl.models.config import GPTConfig
from megarl.models.encoder_decoder import Spans, initial_std, layer_of, spans, with_start
from megarl.models.experts import global_name
from megarl.models.heads import (
    HEADS,
    QHeads,
    ScoreHead,
    TargetQHeads,
    ValueHead,
    head_of,
    is_vocabulary_wide,
    linear_std,
)
from megarl.models.kernels import kernels
from megarl.models.linear import pad_for_products, product
from megarl.models.rotary import rotation
from megarl.models.sliced_attention import SlicedMasks
from megarl.parallel.choices import Choices
from megarl.parallel.context import TimeSlices
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import Std, draw, initialise, is_sharded
from megarl.parallel.rows import ModelInputs
from megarl.parallel.shards import sharded_tensor
from megarl.parallel.vocab import VocabShard, VocabStats, padded_vocab, vocab_stats

EMBEDDING = "embedding.word_embeddings.weight"


class TokenLogprobs(NamedTuple):
    """Log-probs of targets and entropy of the sampling distribution, [bins, time], 0 where the mask is 0."""

    logprobs: Tensor
    entropy: Tensor | None


class TokenQ(NamedTuple):
    """Results per Q head, [bins, time], 0 where the mask is 0: the value of the target token, the cross entropy of the
    head's values against it, and the target head's value of it, which has no gradient."""

    q: list[Tensor]
    nll: list[Tensor]
    target_q: list[Tensor]


class OutputLayer(ColumnParallelLinear):
    """The output layer over the vocabulary, which returns statistics of the targets instead of logits."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor,
        shard: VocabShard,
        weight: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        choices: Choices | None = None,
    ) -> VocabStats:
        """Return `vocab_stats` of hidden [n, hidden] at targets [n]; a tied `weight` replaces the layer's own."""
        weight = self.weight if weight is None else weight
        return vocab_stats(
            hidden, weight, targets, shard, bias=self.bias, temperature=temperature, entropy=entropy, choices=choices
        )


class GPT(LanguageModule):
    """One chunk of a GPT: embedding in the first chunk; layers; final norm and output layer in the last chunk.

    `forward(inputs)` returns hidden states (the last chunk's after the final norm). `logprobs` applies the output layer
    to them at masked-in targets only.

    Under context parallelism the hidden states are those of this rank's slices of time. Inputs, and what heads and the
    output layer return, have all positions.
    """

    value_head: ValueHead
    score_head: ScoreHead
    q_heads: QHeads
    target_q_heads: TargetQHeads

    def __init__(
        self,
        config: GPTConfig,
        grid: Grid,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        heads: Sequence[str] = ("lm",),
    ) -> None:
        """`heads` are names from `HEADS`, repeated for several; without `lm` there is no output layer."""
        if config.encoder is not None and config.encoder.start_id is None:
            raise ValueError("the start token of the decoder is not known: resolve_pretrained gives it")
        super().__init__(config=config, pg_collection=grid.groups)
        self.config: GPTConfig = config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = config.tie_embeddings and "lm" in heads
        self.groups, self.tp_group = grid.groups, grid.groups.tp
        self.slices = TimeSlices(grid.groups.cp)
        rows = padded_vocab(config.vocab_size, grid.layout.tp)
        self.shard = VocabShard.of(config.vocab_size, grid.tp_rank, grid.layout.tp, grid.groups.tp)
        if pre_process:
            learned = config.position == "learned"
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=rows,
                max_sequence_length=config.max_positions + config.position_offset,
                position_embedding_type="learned_absolute" if learned else "none",
                tp_group=grid.groups.tp,
            )
            words = kernels(config.kernels).words
            if not isinstance(self.embedding.word_embeddings, words):  # Megatron accepts no embedding class
                self.embedding.word_embeddings = words(
                    rows,
                    config.hidden_size,
                    init_method=config.embedding_init_method,
                    reduce_scatter_embeddings=self.embedding.reduce_scatter_embeddings,
                    config=config,
                    tp_group=grid.groups.tp,
                )
        layers = get_num_layers_to_build(config, vp_stage, grid.pp_rank)
        first = get_transformer_layer_offset(config, vp_stage, grid.pp_rank) + 1
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(
                layer_specs=[ModuleSpec(module=layer_of(config, first + index)) for index in range(layers)],
                layer_norm=kernels(config.kernels).norm(config.normalization),
            ),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=grid.groups,
            vp_stage=vp_stage,
        )
        if config.adapter is not None:
            attach(self.decoder.layers, config.adapter, config, grid.groups.tp)
        if post_process and "lm" in heads:
            self.output_layer = OutputLayer(
                config.hidden_size,
                rows,
                config=config,
                init_method=config.init_method,
                bias=config.lm_head_bias,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and config.tie_embeddings,
                tp_group=grid.groups.tp,
            )
        if unknown := set(heads) - {"lm", "value", "score", "q"}:
            raise ValueError(f"{sorted(unknown)} are not valid heads")
        self.heads = tuple(heads)
        counts = Counter(heads)
        counts["target_q"] = counts["q"]
        mine = [(name, head) for name, head in HEADS.items() if post_process and counts[name]]
        for name, head in mine:
            setattr(self, head.attribute, head(config, counts[name], grid.groups.tp))
        # Megatron creates learned positions and Apex norms on the default device.
        self.to(device=grid.device, dtype=config.params_dtype)
        for _, head in mine:
            if head.dtype is not None:
                getattr(self, head.attribute).to(head.dtype)
        if "lm" in heads and (pre_process or post_process):
            self.setup_embeddings_and_output_layer()
        elif pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True

    def forward(self, inputs: ModelInputs, cache: CacheView | None = None) -> Tensor:
        """Return the final hidden states [time, bins, hidden] of the inputs; other stages return their own output.

        With a cache, the pass stores its keys and values there, and a pass over single tokens reads earlier ones. Such
        passes are over all positions, of this rank's own sequences.
        """
        hidden = None
        if self.config.encoder is not None:
            assert self.config.encoder.start_id is not None
            inputs = with_start(inputs, self.config.encoder.start_id)
        if self.pre_process:
            hidden = self._embed(inputs, whole=cache is not None)
            if self.config.recompute_granularity == "full" and torch.is_grad_enabled() and self._layers_train():
                # Recomputation is re-entrant: where the first input needs no gradient (a frozen embedding), the
                # layers' weights would get none either, and nothing would say so.
                hidden.requires_grad_()
        context = self._context(inputs, cache)
        result: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
        if self.post_process and isinstance(context, Spans):
            return result[context.split :]
        return result

    def _embed(self, inputs: ModelInputs, *, whole: bool) -> Tensor:
        """Return the embedded tokens [time, bins, hidden], those of an encoder first: `whole`, or this rank's slices of
        time."""
        tokens, positions = inputs.tokens, inputs.positions + self.config.position_offset
        if not whole:
            tokens, positions = self.slices.mine(tokens), self.slices.mine(positions)
        own: Tensor | None = None
        if tokens.shape[1]:
            own = self.embedding(input_ids=tokens, position_ids=positions)
        if inputs.encoder is None:
            assert own is not None
            return own
        read: Tensor = self.embedding(input_ids=inputs.encoder.tokens, position_ids=inputs.encoder.positions)
        return read if own is None else torch.cat([read, own])

    def _context(self, inputs: ModelInputs, cache: CacheView | None) -> Context | Spans:
        """Return the inputs of the layers besides the hidden states."""
        if self.config.encoder is not None:
            return spans(inputs, self.config, self._tables(), cache)
        slices = self.slices if cache is None else None
        positions, turn = inputs.positions if slices is None else slices.mine(inputs.positions), None
        if self.config.position == "rope":
            turn = rotation(positions, self.config.rope, self.config.rotary_dim, self.config.params_dtype)
        window = self.config.sliding_window
        if cache is not None and cache.length is not None:
            return Context(turn, cache.mask(window), cache, origins=inputs.origins)
        time, place = inputs.tokens.shape[1], (inputs.tokens.device, self.config.params_dtype)
        if slices is None or slices.size == 1:
            mask = attention_mask(inputs.segment_ids, time, window, *place)
            return Context(turn, mask, cache, origins=inputs.origins)
        dropping = self.training and self.config.attention_dropout > 0  # `causal_after` drops no weights
        masks = [
            attention_mask(inputs.segment_ids, time, window, *place, queries=bounds, always=dropping)
            for bounds in slices.bounds(time)
        ]
        return Context(turn, None, origins=inputs.origins, sliced=SlicedMasks(slices, masks))

    def _tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the relative positions of the encoder and of the decoder, where this chunk has their first layers."""
        held = {
            layer.layer_number: getattr(layer.self_attention, "relative_positions", None)
            for layer in self.decoder.layers
        }
        return held.get(1), held.get(self.config.encoder_layers + 1)

    def _layers_train(self) -> bool:
        return any(parameter.requires_grad for parameter in self.decoder.parameters())

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Set the previous stage's output as this stage's input; Megatron's schedule calls this."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        target_mask: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        choices: Choices | None = None,
    ) -> TokenLogprobs:
        """Return log-probs of `targets` [bins, time], each predicted from the state at its position; 0 if masked out.

        Args:
            hidden: [time, bins, hidden], the output of the last chunk.
            targets: [bins, time].
            target_mask: [bins, time].
            temperature: divides the logits.
            entropy: whether to compute the entropy too.
            choices: the tokens that may be chosen, with list_index [bins, time]; None for all.
        """
        states, tokens, where = self.at_targets(hidden, targets, target_mask)
        states = self._scaled(states)
        if choices is not None:
            index = self.slices.mine(choices.list_index)[where]
            choices = Choices(choices.lists, F.pad(index, (0, len(tokens) - len(index))))
        stats = self.output_layer(
            states,
            tokens,
            self.shard,
            self._output_weight(),
            temperature=temperature,
            entropy=entropy,
            choices=choices,
        )
        entropies = None if stats.entropy is None else self.laid_out(where, stats.entropy)
        return TokenLogprobs(self.laid_out(where, stats.logprobs), entropies)

    def token_q(self, hidden: Tensor, targets: Tensor, target_mask: Tensor) -> TokenQ:
        """Return the values of `targets` [bins, time] from the Q heads and their target heads, predicted from the state
        at the same position; 0 where the mask is 0."""
        states, tokens, where = self.at_targets(hidden, targets, target_mask)
        stats = [head.stats(states, tokens, self.shard) for head in self.q_heads]
        followed = [head.values_of(states.detach(), tokens, self.shard) for head in self.target_q_heads]
        return TokenQ(
            q=[self.laid_out(where, stat.target_logits) for stat in stats],
            nll=[self.laid_out(where, -stat.logprobs) for stat in stats],
            target_q=[self.laid_out(where, target) for target in followed],
        )

    def move_targets(self, alpha: float) -> None:
        """Move the target heads by `alpha` towards the Q heads (Polyak averaging); stages without heads do nothing."""
        if hasattr(self, TargetQHeads.attribute):
            self.target_q_heads.move(self.q_heads, alpha)

    def at_targets(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the states [n, hidden] and targets [n] at masked-in positions; return them with the mask as booleans.

        Both may be padded with zeros, whose results `laid_out` drops. The mask is that of this rank's slices of time.
        """
        targets, where = self.slices.mine(targets), self.slices.mine(mask) != 0
        bins, times = where.nonzero(as_tuple=True)
        # A copy and not a transposed view: a view's gradient would not be contiguous, and for such tensors Megatron's
        # reduction over tensor-parallel ranks silently keeps each rank's partial gradient.
        states, tokens = self.whole_sequence(hidden)[times, bins], targets[bins, times]
        states, tokens = pad_for_products(states, tokens)
        return states, tokens, where

    def laid_out(self, where: Tensor, values: Tensor) -> Tensor:
        """Return [bins, time] with the values [n] of the states of `at_targets` at their positions and 0 elsewhere;
        surplus values are dropped."""
        mine = torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)
        return self.slices.whole(mine)

    def values(self, hidden: Tensor) -> Tensor:
        """Return the values [bins, time] of the states after the token at each position."""
        return self.slices.whole(self.value_head(self._replicated(hidden)).t())

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores [bins, time] of all tokens up to each position."""
        return self.slices.whole(self.score_head(self._replicated(hidden)).t())

    def _replicated(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of all positions for a head that every tensor-parallel rank computes whole."""
        if not self.config.sequence_parallel:
            return hidden
        # Every rank has the whole gradient already: it is split, not summed.
        whole: Tensor = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.tp_group
        )
        return whole

    def logits(self, states: Tensor) -> Tensor:
        """Return this shard's logits [rows, valid] in float32 for final hidden states [rows, hidden], for sampling."""
        weight = self._output_weight()
        weight = self.output_layer.weight if weight is None else weight
        valid, bias = slice(0, self.shard.valid), self.output_layer.bias
        return product(self._scaled(states), weight[valid], None if bias is None else bias[valid]).float()

    def _scaled(self, states: Tensor) -> Tensor:
        """Return the states for the output layer."""
        encoder = self.config.encoder
        return states if encoder is None or not encoder.scale_outputs else states * self.config.hidden_size**-0.5

    def whole_sequence(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of all positions on every tensor-parallel rank. Their gradients are summed."""
        whole: Tensor
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return whole

    def _output_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the embedding weight on the first stage and the output weight on others; Megatron ties the two."""
        weight: Tensor = self.embedding.word_embeddings.weight if self.pre_process else self.output_layer.weight
        return weight

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return Megatron's description of this chunk's weight shards; Megatron's own method expects an output
        layer. With adapters, it describes these and the heads alone: the weights beside them never change."""
        if self.config.adapter is not None:
            absent = self.not_stored()
            names = {id(parameter): name for name, parameter in self.global_names()}
            return {
                name: sharded_tensor(names[id(parameter)], parameter, self.groups)
                for name, parameter in self.named_parameters()
                if name not in absent
            }
        if "lm" in self.heads:
            return super().sharded_state_dict(*args, **kwargs)
        return super(LanguageModule, self).sharded_state_dict(*args, **kwargs)  # type: ignore[misc]

    def not_stored(self) -> set[str]:
        """Return the names in this chunk of the parameters that checkpoints do not contain: those beside adapters."""
        if self.config.adapter is None:
            return set()
        return {name for name, _ in self.named_parameters() if ADAPTER not in name and head_of(name) is None}

    def global_names(self) -> list[tuple[str, nn.Parameter]]:
        """Return parameters by their names in the whole model: layers counted from 0, a tied output as embedding."""
        first = self.decoder.layers[0].layer_number - 1 if len(self.decoder.layers) else 0
        first_expert = 0
        if self.config.experts is not None:
            first_expert = int(self.config.experts.count or 0) // self.groups.ep.size() * self.groups.ep.rank()
        named = []
        for name, parameter in self.named_parameters():
            head, _, rest = name.partition("decoder.layers.")
            if rest:
                local, _, tail = rest.partition(".")
                name = global_name(f"{head}decoder.layers.{int(local) + first}.{tail}", first_expert)
            elif name == "output_layer.weight" and self.share_embeddings_and_output_weights:
                name = EMBEDDING
            named.append((name, parameter))
        return named

    def initialise(self, grid: Grid, seed: int, loaded: Container[str] = (), head_std: float | None = None) -> None:
        """Initialise weights as GPT-2 does: normal with `init_std`, scaled down by depth where they feed the residual
        stream. Those of an encoder-decoder start as T5's. Heads have a standard deviation of their own, or `head_std`.

        `loaded` are names that will be read from files and need no random values.
        """
        deep = self.config.init_std / (2 * self.config.num_layers) ** 0.5

        def std(name: str, parameter: nn.Parameter) -> Std | None:
            if "norm" in name:
                return None
            if name.endswith(".bias"):
                return 0.0
            if ADAPTER in name:
                down = name.endswith(".down")
                return linear_std(parameter, tp=grid.layout.tp if is_sharded(parameter) else 1) if down else 0.0
            if head := head_of(name):
                return head.std(parameter) if head_std is None else head_std
            if self.config.encoder is not None:
                return initial_std(name, self.config)
            return deep if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else self.config.init_std

        for name, linear in quantised_linears(self):
            deviation = std(name, linear.weight_like)
            if name not in loaded and deviation is not None:
                fill(linear, draw(name, linear.weight_like, seed, deviation, grid.layout.tp))

        def drawn_as(name: str) -> str:
            """Return the name whose random values are used: a target head starts as the head that it tracks."""
            head = head_of(name)
            return name if head is None else head.starts_as + name.removeprefix(head.attribute)

        initialise(
            [(drawn_as(name), parameter) for name, parameter in self.global_names() if name not in loaded],
            seed=seed,
            std=std,
            tp_rank=grid.tp_rank,
            tp=grid.layout.tp,
            full_rows=lambda name: (
                self.config.vocab_size
                if name in (EMBEDDING, "output_layer.weight") or is_vocabulary_wide(name)
                else None
            ),
        )
