"""The shape of a GPT as Megatron's configuration, with the fields that Megatron's own lacks."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.config.sections.model import EncoderConfig, ExpertsConfig, ModelConfig, RopeScalingConfig
from megarl.models.adapter_spec import AdapterSpec
from megarl.parallel.device import device_settings
from megarl.parallel.layout import Layout

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "geglu": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
}


def _leave(weight: Tensor) -> Tensor:
    """Do nothing: Megatron's init hook. `megarl.parallel.initialise` fills weights, the same in every layout."""
    return weight


@dataclass
class Rope:
    """Rotary positions: the rotated fraction of a head, the base, and the scaling for long contexts."""

    base: float = 10000.0
    percent: float = 1.0
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int | None = None


@dataclass
class GPTConfig(TransformerConfig):
    """Megatron's `TransformerConfig` with the additional fields of a GPT."""

    vocab_size: int = 0
    max_positions: int = 0
    position: str = "rope"
    position_offset: int = 0
    rope: Rope = field(default_factory=Rope)
    tie_embeddings: bool = False
    out_bias: bool = False
    lm_head_bias: bool = False
    parallel_residual: str = "none"
    sliding_window: int | None = None
    init_std: float = 0.02
    kernels: str = "auto"
    adapter: AdapterSpec | None = None
    encoder: EncoderConfig | None = None
    experts: ExpertsConfig | None = None
    expert_width: int = 0

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        layout: Layout,
        *,
        vocab_size: int,
        precision: str = "fp32",
        recompute: str = "none",
        kernels: str = "auto",
        adapter: AdapterSpec | None = None,
    ) -> "GPTConfig":
        """Build the configuration of a model in a layout; `recompute` and `kernels` are choices of parallel.* keys."""
        scaling = model.rope_scaling or RopeScalingConfig()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        choices: dict[str, dict[str, Any]] = {
            "none": {},
            "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
            "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        }
        return cls(
            num_layers=model.layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_heads,
            num_query_groups=model.kv_heads,
            kv_channels=model.head_width,
            ffn_hidden_size=model.ffn_width,
            normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
            layernorm_epsilon=model.norm_eps,
            qk_layernorm=model.qk_norm,
            gated_linear_unit=model.is_gated,
            activation_func=ACTIVATIONS[model.activation],
            add_bias_linear=model.mlp_bias,
            add_qkv_bias=model.qkv_bias,
            hidden_dropout=model.dropout,
            attention_dropout=model.dropout,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            init_method=_leave,
            output_layer_init_method=_leave,
            embedding_init_method=_leave,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=precision == "bf16",
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            sequence_parallel=layout.sequence_parallel,
            deallocate_pipeline_outputs=True,
            # With two stages, the previous and next rank are one process, and a batch would mix up their messages.
            batch_p2p_comm=device_settings().batched_p2p and not (layout.vpp > 1 and layout.pp == 2),
            vocab_size=vocab_size,
            max_positions=model.max_positions,
            position=model.position,
            position_offset=model.position_offset,
            rope=Rope(
                base=model.rope_base,
                percent=model.rope_percent,
                interleaved=model.rope_interleaved,
                scaling=scaling.kind or "none",
                factor=scaling.factor,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_positions=scaling.original_positions,
            ),
            tie_embeddings=model.tie_embeddings,
            out_bias=model.out_bias,
            lm_head_bias=model.lm_head_bias,
            parallel_residual=model.parallel_residual,
            sliding_window=model.sliding_window,
            init_std=model.init_std,
            kernels=kernels,
            adapter=adapter,
            encoder=model.encoder,
            experts=model.experts,
            expert_width=model.expert_width,
            **choices[recompute],
        )

    @property
    def encoder_layers(self) -> int:
        """Number of first layers that are the encoder's; 0 without one."""
        return 0 if self.encoder is None else int(self.encoder.num_layers or 0)

    def has_experts(self, number: int) -> bool:
        """Return whether a layer, counted from 1 as Megatron does, has experts instead of a plain MLP."""
        return self.experts is not None and number - 1 not in self.experts.dense_layers

    @property
    def expert_layers(self) -> int:
        """Number of layers of the whole model that have experts."""
        return sum(self.has_experts(number + 1) for number in range(self.num_layers))

    @property
    def head_dim(self) -> int:
        """Width of a head's queries, keys and values."""
        return int(self.kv_channels or 0)

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads; fewer than query heads under grouped-query attention."""
        return int(self.num_query_groups or self.num_attention_heads)

    @property
    def rotary_dim(self) -> int:
        """Number of a head's dimensions that are rotated; even, because rotation works on pairs."""
        return int(self.head_dim * self.rope.percent) // 2 * 2
