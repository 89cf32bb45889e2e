"""GPT-2: learned positions, fused QKV stored transposed (Conv1D), tied embeddings."""

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.family import Family, Json, activation, both, entry, require, their_activation
from megarl.models.exchange.views import fused_query_key_value_transposed, transposed

LAYER, THEIRS = "decoder.layers.{}", "transformer.h.{}"


def read(config: Json) -> ModelConfig:
    """Convert GPT-2's config.json to our shape; scaling variants and cross attention are rejected."""
    require(config, "scale_attn_weights", True, True)
    require(config, "scale_attn_by_inverse_layer_idx", False, False)
    require(config, "add_cross_attention", False, False)
    return ModelConfig(
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        num_heads=config["n_head"],
        ffn_size=config.get("n_inner") or 4 * config["n_embd"],
        max_positions=config.get("n_positions", 1024),
        position="learned",
        norm="layernorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config, "activation_function", "gelu_new"),
        tie_embeddings=config.get("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def write(model: ModelConfig) -> Json:
    """Return GPT-2's config.json keys for a shape."""
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_width,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": their_activation(model),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    read=read,
    write=write,
    entries=(
        *entry("embedding.word_embeddings.weight", "transformer.wte.weight"),
        *entry("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *both(f"{LAYER}.input_layernorm", f"{THEIRS}.ln_1"),
        *both(f"{LAYER}.self_attention.linear_qkv", f"{THEIRS}.attn.c_attn", views=fused_query_key_value_transposed),
        *both(f"{LAYER}.self_attention.linear_proj", f"{THEIRS}.attn.c_proj", views=transposed),
        *both(f"{LAYER}.pre_mlp_layernorm", f"{THEIRS}.ln_2"),
        *both(f"{LAYER}.mlp.linear_fc1", f"{THEIRS}.mlp.c_fc", views=transposed),
        *both(f"{LAYER}.mlp.linear_fc2", f"{THEIRS}.mlp.c_proj", views=transposed),
        *both("decoder.final_layernorm", "transformer.ln_f"),
        *entry("output_layer.weight", "lm_head.weight"),
    ),
    ignored={r"transformer\.h\.\d+\.attn\.(bias|masked_bias)": "a causal mask, not a weight"},
)
