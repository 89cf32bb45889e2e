"""Llama 1 to 3.x: rotary positions (stretched in several ways), RMSNorm, gated MLP, grouped heads.

Mistral, Qwen2 and Qwen3 store the same tensors and share the functions here.
"""

from typing import Any

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.family import Family, Json, both, entry, require
from megarl.models.exchange.rope import read_rope, write_rope
from megarl.models.exchange.views import gate_and_up, query_key_value

LAYER, THEIRS = "decoder.layers.{}", "model.layers.{}"
PREFIX = "model."
IGNORED = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "rotary frequencies, computed from the base"}

ENTRIES = (
    *entry("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    *entry(f"{LAYER}.input_layernorm.weight", f"{THEIRS}.input_layernorm.weight"),
    *both(
        f"{LAYER}.self_attention.linear_qkv",
        *(f"{THEIRS}.self_attn.{name}_proj" for name in "qkv"),
        views=query_key_value,
    ),
    *both(f"{LAYER}.self_attention.linear_proj", f"{THEIRS}.self_attn.o_proj"),
    *entry(f"{LAYER}.pre_mlp_layernorm.weight", f"{THEIRS}.post_attention_layernorm.weight"),
    *both(f"{LAYER}.mlp.linear_fc1", f"{THEIRS}.mlp.gate_proj", f"{THEIRS}.mlp.up_proj", views=gate_and_up),
    *both(f"{LAYER}.mlp.linear_fc2", f"{THEIRS}.mlp.down_proj"),
    *entry("decoder.final_layernorm.weight", "model.norm.weight"),
    *entry("output_layer.weight", "lm_head.weight"),
)


def read_shape(config: Json, *, eps: float = 1e-6, theta: float = 10000.0) -> dict[str, Any]:
    """Return the shape's keys that all of these families share; `eps` and `theta` are the family's defaults."""
    require(config, "hidden_act", "silu", "silu")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim"),
        "ffn_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        **read_rope(config, theta=theta),
        "norm_eps": config.get("rms_norm_eps", eps),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def write_shape(model: ModelConfig) -> Json:
    """Return the config.json keys that all of these families share."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "intermediate_size": model.ffn_width,
        "max_position_embeddings": model.max_positions,
        "rope_parameters": write_rope(model),
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": model.dropout,
    }


def read(config: Json) -> ModelConfig:
    """Convert Llama's config.json to our shape, with its optional attention and MLP biases."""
    bias = config.get("attention_bias", False)
    return ModelConfig(**read_shape(config), qkv_bias=bias, out_bias=bias, mlp_bias=config.get("mlp_bias", False))


def write(model: ModelConfig) -> Json:
    """Return Llama's config.json keys for a shape."""
    return {**write_shape(model), "attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=ENTRIES,
    ignored=IGNORED,
)
