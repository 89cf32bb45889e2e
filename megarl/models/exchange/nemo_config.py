"""Conversion between `model_config.yaml` of NeMo's GPT archives and `ModelConfig`; unsupported keys are named."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from megarl.config.sections.model import ModelConfig, RopeScalingConfig
from megarl.disk import shown
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.family import Json, check_values, checked, shape_of

WHERE = "model_config.yaml"
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
VOCAB_MULTIPLE = 128  # NeMo's make_vocab_size_divisible_by; times TP
_LLAMA3 = RopeScalingConfig(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192
)
"""What NeMo's scale_positional_embedding=true stands for; NeMo has no keys for other values."""
_POSITIONS = {"learned_absolute": "learned", "rope": "rope", "none": "none"}
_NORMS = {"layernorm": "layernorm", "low_precision_layernorm": "layernorm", "rmsnorm": "rmsnorm"}
_PRECISIONS = {torch.float32: 32, torch.bfloat16: "bf16", torch.float16: 16}
_ONLY: Json = {
    "transformer_block_type": "pre_ln",
    "num_moe_experts": None,
    "headscale": False,
    "normalize_attention_scores": True,
    "embedding_multiplier": None,
    "multi_latent_attention": False,
}
"""Keys whose other values describe models that megarl lacks, with NeMo's defaults."""


def read_config(config: Json) -> ModelConfig:
    """Return the shape that a model_config.yaml describes, with NeMo's defaults for missing keys."""
    if "GPT" not in str(config.get("target", "GPT")):
        raise CheckpointError(
            f"{WHERE} has target={shown(config['target'])}: only GPT models can be read",
            key="target",
            value=config["target"],
            where=WHERE,
        )
    for key, only in _ONLY.items():
        if (config.get(key, only) or only) != only:
            raise _lacking(key, config[key], [only])
    check_values(config, WHERE)
    try:
        return checked(_read(config), WHERE)
    except KeyError as problem:
        key = problem.args[0]
        raise CheckpointError(f"{WHERE} lacks {key!r}: restore it", key=key, where=WHERE) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as problem:
        raise CheckpointError(f"{WHERE} has a value that cannot be: {problem}", where=WHERE) from None


def _lacking(key: str, found: Any, known: Iterable[Any]) -> CheckpointError:
    known = list(known)
    return CheckpointError(
        f"{WHERE} has {key}={shown(repr(found))}, which megarl lacks: choose from {', '.join(map(str, known))}",
        key=key,
        value=found,
        where=WHERE,
        offers={key: known},
    )


def _read(config: Json) -> ModelConfig:
    bias = bool(config.get("bias", True))
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return ModelConfig(
        num_layers=int(config["num_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(config.get("num_query_groups") or heads),
        head_dim=int(config.get("kv_channels") or hidden // heads),
        ffn_size=int(config.get("ffn_hidden_size") or 4 * hidden),
        max_positions=int(config["max_position_embeddings"]),
        position=_choice(config, "position_embedding_type", "learned_absolute", _POSITIONS),
        norm=_choice(config, "normalization", "layernorm", _NORMS),
        norm_eps=float(config.get("layernorm_epsilon") or 1e-5),
        activation=_activation(config, bias),
        tie_embeddings=bool(config.get("share_embeddings_and_output_weights", True)),
        qk_norm=bool(config.get("qk_layernorm") or False),
        qkv_bias=bias or bool(config.get("qkv_bias") or False),
        out_bias=bias,
        mlp_bias=bias,
        sliding_window=_window(config),
        init_std=float(config.get("init_method_std") or 0.02),
        **_rope(config),
    )


def _choice(config: Json, key: str, default: str, known: dict[str, str]) -> str:
    theirs = config.get(key) or default
    if theirs not in known:
        raise _lacking(key, theirs, known)
    return known[theirs]


def _activation(config: Json, bias: bool) -> str:
    """Return the activation; `gelu` is the tanh approximation if NeMo fuses it with the bias, as it does by default."""
    fused = bias and bool(config.get("bias_activation_fusion", True))
    gelu = "gelu_tanh" if fused or config.get("openai_gelu") else "gelu"
    return _choice(config, "activation", "gelu", {"gelu": gelu, "swiglu": "swiglu", "fast-swiglu": "swiglu"})


def _rope(config: Json) -> Json:
    fields: Json = {
        "rope_base": float(config.get("rotary_base") or 10000.0),
        "rope_percent": float(config.get("rotary_percentage") or 1.0),
        "rope_interleaved": bool(config.get("rotary_interleaved") or False),
    }
    stretch = float(config.get("seq_len_interpolation_factor") or 1.0)
    if config.get("scale_positional_embedding"):
        if stretch != 1.0:
            raise CheckpointError(
                f"{WHERE} has scale_positional_embedding and seq_len_interpolation_factor, which megarl cannot compute "
                "together: drop one of them",
                key="seq_len_interpolation_factor",
                value=stretch,
                where=WHERE,
            )
        return fields | {"rope_scaling": replace(_LLAMA3)}
    return fields | ({"rope_scaling": RopeScalingConfig("linear", stretch)} if stretch != 1.0 else {})


def _window(config: Json) -> int | None:
    """Convert the window: NeMo's is [tokens to the left, to the right]; ours also counts the token itself."""
    window = config.get("window_size")
    if window is None or tuple(window) == (-1, -1) or tuple(window) == (-1, 0):
        return None
    left, right = window
    if right != 0 or left < 0:
        raise CheckpointError(
            f"{WHERE} has window_size={list(window)}: only [N, 0] can be computed",
            key="window_size",
            value=list(window),
            where=WHERE,
        )
    return int(left) + 1


def write_config(model: ModelConfig, vocab_size: int, dtype: torch.dtype, tp: int, pp: int) -> Json:
    """Return a model_config.yaml. Raise for a shape that would be read back as another one."""
    if model.encoder is not None:
        layers = model.encoder.num_layers
        raise ConfigError(
            f"a .nemo archive holds a GPT, which cannot have model.encoder.num_layers={layers}: use format=huggingface "
            "or format=megarl",
            key="model.encoder.num_layers",
            value=layers,
            offers={"format": ["huggingface", "megarl"]},
        )
    positions = {ours: theirs for theirs, ours in _POSITIONS.items()}
    if dtype not in _PRECISIONS:
        raise ConfigError(
            f"dtype={str(dtype).removeprefix('torch.')} is not a dtype of NeMo: use fp32, bf16 or fp16",
            key="dtype",
            value=dtype,
            offers={"dtype": ["fp32", "bf16", "fp16"]},
        )
    config: Json = {
        "target": TARGET,
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": False,
        "precision": _PRECISIONS[dtype],
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "encoder_seq_length": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_width,
        "init_method_std": model.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "position_embedding_type": positions[model.position],
        "rotary_base": model.rope_base,
        "rotary_percentage": model.rope_percent,
        "rotary_interleaved": model.rope_interleaved,
        "normalization": model.norm,
        "layernorm_epsilon": model.norm_eps,
        "activation": {"gelu_tanh": "gelu", "swiglu": "fast-swiglu"}.get(model.activation, model.activation),
        "openai_gelu": model.activation == "gelu_tanh",
        "bias_activation_fusion": False,
        "bias": model.mlp_bias,
        "qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "share_embeddings_and_output_weights": model.tie_embeddings,
        "transformer_block_type": "pre_ln",
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "override_vocab_size": vocab_size,
    }
    if model.rope_scaling is not None and model.rope_scaling.kind == "linear":
        config["seq_len_interpolation_factor"] = model.rope_scaling.factor
    if model.rope_scaling is not None and model.rope_scaling.kind == "llama3":
        config["scale_positional_embedding"] = True
    if model.sliding_window is not None:
        config["window_size"] = [model.sliding_window - 1, 0]
    lost = _lost(model, config)
    if lost:
        value = shape_of(model)[lost]
        raise ConfigError(
            f"a .nemo archive cannot have model.{lost}={value}: use format=huggingface or format=megarl",
            key=f"model.{lost}",
            value=value,
            offers={"format": ["huggingface", "megarl"]},
        )
    return config


def _lost(model: ModelConfig, config: Json) -> str | None:
    """Return the first key of a model that does not survive writing and reading."""
    try:
        back: dict[str, Any] = shape_of(read_config(config))
    except CheckpointError:
        return "activation"  # the only choice without a name in NeMo
    return next((key for key, value in shape_of(model).items() if back[key] != value), None)
