"""The shape of the transformer, and what must be true of it in any layout."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf, optional_section
from megarl.config.offers import Refusal, either, multiples, require_divides

MOST_PARAMETERS = 10**13
GATED = ("geglu", "swiglu")
"""Activations of gated MLPs."""
SCALINGS = ("linear", "llama3", "yarn")


@dataclass
class RopeScalingConfig(Section):
    """How rotary frequencies are lowered for contexts longer than in pretraining."""

    kind: str | None = leaf(None, "How the frequencies are lowered. Required (null is refused).", SCALINGS)
    factor: float = leaf(1.0, "Factor of the longer context.", at_least=1)
    low_freq_factor: float = leaf(
        1.0,
        "Only with kind=llama3: frequencies with fewer turns within original_positions than this are divided by "
        "factor.",
        above=0,
    )
    high_freq_factor: float = leaf(
        4.0,
        "Only with kind=llama3: frequencies with more turns within original_positions than this are kept; those "
        "between the two are interpolated.",
        above=0,
    )
    original_positions: int | None = leaf(
        None,
        "Context length in pretraining. Required with kind=llama3 and yarn; no effect otherwise.",
        at_least=1,
        at_most=2**31 - 1,
    )

    def check(self) -> None:
        """Require a kind, and what the kind needs."""
        if self.kind is None:
            raise Refusal(
                "model.rope_scaling.kind=null does not say how rotary frequencies are lowered",
                {"model.rope_scaling.kind": SCALINGS, "model.rope_scaling": [None]},
                key="model.rope_scaling.kind",
            )
        if self.kind in ("llama3", "yarn") and self.original_positions is None:
            raise Refusal(
                f"model.rope_scaling.kind={self.kind} needs model.rope_scaling.original_positions, the context "
                "length before stretching: set it, for example to 8192",
                key="model.rope_scaling.original_positions",
            )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise Refusal(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor:g} is not below "
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor:g}",
                {"model.rope_scaling.low_freq_factor": [1], "model.rope_scaling.high_freq_factor": [4]},
                "another pair, the low one smaller",
                key="model.rope_scaling.low_freq_factor",
                value=self.low_freq_factor,
            )


@dataclass
class EncoderConfig(Section):
    """The encoder of an encoder-decoder, which reads the prompt. The decoder writes the response."""

    num_layers: int | None = leaf(
        None, "Number of layers of the encoder. Required (null is refused).", at_least=1, at_most=10_000
    )
    buckets: int = leaf(
        32, "Number of distances between tokens that have an own value in attention.", at_least=4, at_most=2**20
    )
    longest_distance: int = leaf(
        128, "Distance from which on all tokens share one value in attention.", at_least=2, at_most=2**31 - 1
    )
    start_id: int | None = leaf(
        None,
        "Token that the decoder reads first. It should be one that no response contains, as the decoder cannot tell "
        "how often it has read a token (null: the tokenizer's padding).",
        at_least=0,
        at_most=2**31 - 1,
    )
    scale_outputs: bool = leaf(
        True,
        "Divide the decoder's final states by the root of model.hidden_size before the output layer, as T5 1.0 does.",
    )

    def check(self) -> None:
        """Require the number of layers."""
        if self.num_layers is None:
            raise Refusal(
                "model.encoder.num_layers=null does not say how many layers the encoder has",
                {"model.encoder.num_layers": [4], "model.encoder": [None]},
                key="model.encoder.num_layers",
            )


@dataclass
class ExpertsConfig(Section):
    """A mixture of experts in the place of the MLP: a router sends each token to a few of many small MLPs."""

    count: int | None = leaf(
        None, "Number of experts of a layer. Required (null is refused).", at_least=1, at_most=2**15 - 1
    )
    chosen: int = leaf(2, "Number of experts that compute each token.", at_least=1, at_most=2**15 - 1)
    ffn_size: int | None = leaf(
        None, "Inner width of an expert (null: that of model.ffn_size).", at_least=1, at_most=2**26
    )
    normalise: bool = leaf(
        True,
        "Divide the weights of a token's experts by their sum, as Mixtral and Qwen3-MoE do. false: they are shares of "
        "a softmax over all experts, as in Qwen2-MoE.",
    )
    shared_ffn_size: int | None = leaf(
        None,
        "Inner width of an MLP that computes every token beside the experts, with a gate of its own, as in Qwen2-MoE "
        "(null: none).",
        at_least=1,
        at_most=2**26,
    )
    dense_layers: list[int] = leaf([], "Numbers, from 0, of the layers that have a plain MLP instead of experts.")
    balance: float = leaf(
        0.0,
        "Coefficient of the loss that evens out how many tokens of a row each expert gets (docs/models.md).",
        at_least=0,
    )
    z_loss: float = leaf(
        0.0,
        "Coefficient of the loss that keeps the router's scores small: the square of their log-sum-exp.",
        at_least=0,
    )

    def check(self) -> None:
        """Require the number of experts, and that enough of them exist."""
        if self.count is None:
            raise Refusal(
                "model.experts.count=null does not say how many experts a layer has",
                {"model.experts.count": [8], "model.experts": [None]},
                key="model.experts.count",
            )
        if self.chosen > self.count:
            raise Refusal(
                f"model.experts.chosen={self.chosen} is more than model.experts.count={self.count}",
                {"model.experts.chosen": [self.count]},
                key="model.experts.chosen",
                value=self.chosen,
            )
        if self.chosen == 1 and self.normalise:
            raise Refusal(
                "model.experts.chosen=1 with model.experts.normalise=true gives each expert a weight of 1, so that no "
                "gradient reaches the router",
                {"model.experts.normalise": [False], "model.experts.chosen": [2]},
                key="model.experts.chosen",
                value=1,
            )


@dataclass
class ModelConfig(Section):
    """Shape of the transformer, or the folder it is loaded from."""

    path: str | None = leaf(
        None,
        "Pretrained model: a Hugging Face folder or hub name, a .nemo archive, a megarl checkpoint, or a run folder "
        "(its newest checkpoint). It sets all other keys of model except dropout, init_std and num_layers_unfrozen. "
        "Its tokenizer is used if tokenizer.path is null and tokenizer.kind is bytes or the model's kind (null: "
        "random weights).",
    )
    num_layers: int = leaf(4, "Number of transformer layers.", at_least=1, at_most=10_000)
    hidden_size: int = leaf(128, "Width of the hidden states.", at_least=1, at_most=2**24)
    num_heads: int = leaf(4, "Number of attention heads.", at_least=1, at_most=2**20)
    num_kv_heads: int | None = leaf(
        None,
        "Number of key and value heads, for grouped-query attention (null: model.num_heads).",
        at_least=1,
        at_most=2**20,
    )
    head_dim: int | None = leaf(
        None,
        "Width of one attention head (null: model.hidden_size / model.num_heads).",
        at_least=1,
        at_most=2**20,
    )
    ffn_size: int | None = leaf(
        None, "Inner width of the MLP (null: 4 * model.hidden_size).", at_least=1, at_most=2**26
    )
    max_positions: int = leaf(
        256,
        "Context length: maximum number of tokens in a sequence, also with model.rope_scaling.",
        at_least=1,
        at_most=2**31 - 1,
    )
    vocab_size: int | None = leaf(
        None,
        "Number of tokens in the vocabulary before padding, at least the tokenizer's (null: the tokenizer's size).",
        at_least=1,
        at_most=2**31 - 1,
    )
    position: str = leaf(
        "rope",
        "Kind of position embedding. relative: learned values in attention by distance, as in T5; only with "
        "model.encoder.",
        ("learned", "rope", "none", "relative"),
    )
    position_offset: int = leaf(
        0,
        "Added to every position before a learned embedding is looked up (OPT: 2).",
        at_least=0,
        at_most=2**31 - 1,
    )
    rope_base: float = leaf(10000.0, "Base of the rotary frequencies.", above=0)
    rope_percent: float = leaf(1.0, "Share of each head's width that is rotated.", above=0, at_most=1)
    rope_interleaved: bool = leaf(
        False, "Rotate neighbouring pairs, as GPT-J does, instead of the two halves, as GPT-NeoX and Llama do."
    )
    norm: str = leaf("rmsnorm", "Normalisation layer.", ("layernorm", "rmsnorm"))
    norm_eps: float = leaf(1e-5, "Constant added to the variance in the normalisation.", above=0)
    activation: str = leaf(
        "swiglu", "Activation function of the MLP.", ("gelu", "gelu_tanh", "relu", "geglu", "swiglu")
    )
    tie_embeddings: bool = leaf(False, "Use the weights of the input embedding in the output layer as well.")
    qk_norm: bool = leaf(False, "Normalise the queries and keys of each head.")
    qkv_bias: bool = leaf(False, "Give the projection to queries, keys and values a bias.")
    out_bias: bool = leaf(False, "Give the output projection of the attention a bias.")
    mlp_bias: bool = leaf(False, "Give the projections of the MLP biases.")
    lm_head_bias: bool = leaf(False, "Give the output layer a bias.")
    parallel_residual: str = leaf(
        "none",
        "Compute attention and MLP from the same hidden states, with one shared norm (GPT-J) or a norm each "
        "(GPT-NeoX). none: one after the other.",
        ("none", "one_norm", "two_norms"),
    )
    sliding_window: int | None = leaf(
        None,
        "Number of latest tokens that each token attends to, itself included (null: all).",
        at_least=1,
        at_most=2**31 - 1,
    )
    dropout: float = leaf(
        0.0,
        "Dropout probability of hidden states and attention weights in training. Must be 0 in PPO and GRPO.",
        at_least=0,
        below=1,
    )
    init_std: float = leaf(
        0.02,
        "Standard deviation of random initial weights. Output projections of attention and MLP get this divided by "
        "sqrt(2 * model.num_layers); value and Q heads start like torch's linear layers. With model.encoder, weights "
        "start as T5's do, by the width of their inputs, and other values than 0.02 are refused.",
        above=0,
    )
    num_layers_unfrozen: int = leaf(
        -1,
        "Number of last layers that are trained, together with the final norm, value and Q heads, and an output layer"
        " that is not tied to the embedding (-1: everything). At most model.num_layers.",
        at_least=-1,
    )
    rope_scaling: RopeScalingConfig | None = optional_section(
        RopeScalingConfig,
        "Lower rotary frequencies for contexts longer than in pretraining. Requires model.position=rope.",
        needs="kind",
    )

    encoder: EncoderConfig | None = optional_section(
        EncoderConfig,
        "Make the model an encoder-decoder (T5), whose encoder reads the prompt. Then model.num_layers is the number "
        "of layers of the decoder. Requires model.position=relative.",
        needs="num_layers",
    )

    experts: ExpertsConfig | None = optional_section(
        ExpertsConfig,
        "Replace the MLPs by mixtures of experts (Mixtral, Qwen2-MoE, Qwen3-MoE). Excludes model.encoder, "
        "model.mlp_bias and parallel residuals.",
        needs="count",
    )

    @property
    def encoder_layers(self) -> int:
        """Number of layers of the encoder; 0 without one."""
        return 0 if self.encoder is None else int(self.encoder.num_layers or 0)

    @property
    def layers(self) -> int:
        """Number of all layers."""
        return self.encoder_layers + self.num_layers

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's first product has a second half that gates it."""
        return self.activation in GATED

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Inner width of the MLP."""
        return self.ffn_size or 4 * self.hidden_size

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts instead of a plain MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def expert_width(self) -> int:
        """Inner width of an expert."""
        return (self.experts.ffn_size if self.experts else None) or self.ffn_width

    def check_shape(self) -> None:
        """Refuse a shape that contradicts itself. With `model.path` it is known once the model has been opened."""
        if self.head_dim is None:
            require_divides("model.num_heads", "model.hidden_size", self.num_heads, self.hidden_size)
        if self.num_kv_heads is not None:
            require_divides("model.num_kv_heads", "model.num_heads", self.num_kv_heads, self.num_heads)
        self._check_rope()
        self._check_encoder()
        self._check_experts()
        if self.num_layers_unfrozen > self.layers:
            count = f"model.num_layers={self.num_layers}" if self.encoder is None else f"all {self.layers} layers"
            raise Refusal(
                f"model.num_layers_unfrozen={self.num_layers_unfrozen} is more than {count}",
                {"model.num_layers_unfrozen": [self.layers]},
                "-1 to train everything",
                key="model.num_layers_unfrozen",
                value=self.num_layers_unfrozen,
            )
        self._check_size()

    def _check_rope(self) -> None:
        """Rotary embeddings need an even width and, stretched, the length they were trained at."""
        if self.position != "rope":
            if self.rope_scaling is not None:
                kind = self.rope_scaling.kind
                raise Refusal(
                    f"model.rope_scaling.kind={either([kind])} needs rotary positions, not model.position="
                    f"{self.position}",
                    {"model.position": ["rope"], "model.rope_scaling": [None]},
                    key="model.rope_scaling.kind",
                    value=kind,
                )
            return
        rotated = int(self.head_width * self.rope_percent)
        if rotated < 2 or rotated % 2:
            raise Refusal(
                f"model.rope_percent={self.rope_percent:g} of a head {self.head_width} wide rotates {rotated} "
                "dimensions, which must be an even number",
                {
                    "model.rope_percent": [
                        even / self.head_width for even in multiples(2, rotated) if even <= self.head_width
                    ]
                },
                "an even model.head_dim",
                key="model.rope_percent",
                value=self.rope_percent,
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check()

    def _check_encoder(self) -> None:
        """An encoder-decoder has relative positions, and no other model has; it lacks what no T5 has."""
        if self.encoder is None:
            if self.position == "relative":
                raise Refusal(
                    "model.position=relative needs an encoder-decoder",
                    {"model.position": ["rope"], "model.encoder.num_layers": [self.num_layers]},
                    key="model.position",
                    value=self.position,
                )
            return
        self.encoder.check()
        only = {
            "position": "relative",
            "num_kv_heads": None,
            "parallel_residual": "none",
            "qk_norm": False,
            "sliding_window": None,
            "init_std": 0.02,
        }
        for name, value in only.items():
            found = getattr(self, name)
            if found != value and not (name == "num_kv_heads" and found == self.num_heads):
                raise Refusal(
                    f"model.{name}={either([found])} is not possible with model.encoder",
                    {f"model.{name}": [value], "model.encoder": [None]},
                    key=f"model.{name}",
                    value=found,
                )

    def _check_experts(self) -> None:
        """A mixture of experts lacks what no published one has, and has experts in some layer."""
        if self.experts is None:
            return
        self.experts.check()
        for name, value in {"encoder": None, "mlp_bias": False, "parallel_residual": "none"}.items():
            found = getattr(self, name)
            if found != value:
                raise Refusal(
                    f"model.{name}{'' if name == 'encoder' else '=' + either([found])} is not possible with "
                    "model.experts",
                    {f"model.{name}": [value], "model.experts": [None]},
                    key=f"model.{name}",
                    value=None if name == "encoder" else found,
                )
        dense = self.experts.dense_layers
        if wrong := [number for number in dense if not 0 <= number < self.num_layers]:
            raise Refusal(
                f"model.experts.dense_layers names layer {wrong[0]}, and model.num_layers={self.num_layers} has layers "
                f"0 to {self.num_layers - 1}",
                {"model.experts.dense_layers": [sorted(set(dense) - set(wrong))]},
                key="model.experts.dense_layers",
                value=wrong[0],
            )
        if len(set(dense)) == self.num_layers:
            raise Refusal(
                "model.experts.dense_layers names every layer, so that none has experts",
                {"model.experts.dense_layers": [[]], "model.experts": [None]},
                key="model.experts.dense_layers",
                value=dense,
            )

    def _check_size(self) -> None:
        """Refuse a model that is too large to be intended."""
        rows = (self.vocab_size or 0) + (self.max_positions if self.position == "learned" else 0)
        inner = self.ffn_width if self.experts is None else (self.experts.count or 0) * self.expert_width
        layer = 2 * self.num_heads * self.head_width + 2 * inner
        parameters = self.hidden_size * (self.layers * layer + rows)
        if parameters > MOST_PARAMETERS:
            raise Refusal(
                f"model.hidden_size={self.hidden_size}, model.num_layers={self.num_layers} and the other sizes come to "
                f"{parameters:.0e} parameters, and megarl builds no model of more than {MOST_PARAMETERS:.0e}: use "
                "smaller ones",
                key="model.hidden_size",
                value=self.hidden_size,
            )
