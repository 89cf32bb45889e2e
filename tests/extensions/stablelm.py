"""A family of one's own: StableLM, a Llama with LayerNorm and rotary positions on a part of each head."""

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.family import Family, Json, both, entry, require, share
from megarl.models.exchange.rope import read_rope, write_rope
from megarl.models.exchange.views import gate_and_up, query_key_value

LAYER, THEIRS = "decoder.layers.{}", "model.layers.{}"


def read(config: Json) -> ModelConfig:
    require(config, "hidden_act", "silu", "silu")
    require(config, "qk_layernorm", False, False)
    require(config, "use_parallel_residual", False, False)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    percent = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        ffn_size=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        **read_rope(config),
        rope_percent=share(int(head_dim * percent), head_dim),
        norm="layernorm",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=config.get("use_qkv_bias", False),
    )


def write(model: ModelConfig) -> Json:
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_width,
        "max_position_embeddings": model.max_positions,
        "rope_parameters": {**write_rope(model), "partial_rotary_factor": model.rope_percent},
        "layer_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "use_qkv_bias": model.qkv_bias,
    }


STABLELM = Family(
    name="stablelm",
    architectures=("StableLmForCausalLM", "StableLmModel"),
    prefix="model.",
    read=read,
    write=write,
    entries=(
        *entry("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *both(f"{LAYER}.input_layernorm", f"{THEIRS}.input_layernorm"),
        *both(
            f"{LAYER}.self_attention.linear_qkv",
            *(f"{THEIRS}.self_attn.{name}_proj" for name in "qkv"),
            views=query_key_value,
        ),
        *both(f"{LAYER}.self_attention.linear_proj", f"{THEIRS}.self_attn.o_proj"),
        *both(f"{LAYER}.pre_mlp_layernorm", f"{THEIRS}.post_attention_layernorm"),
        *both(f"{LAYER}.mlp.linear_fc1", f"{THEIRS}.mlp.gate_proj", f"{THEIRS}.mlp.up_proj", views=gate_and_up),
        *both(f"{LAYER}.mlp.linear_fc2", f"{THEIRS}.mlp.down_proj"),
        *both("decoder.final_layernorm", "model.norm"),
        *entry("output_layer.weight", "lm_head.weight"),
    ),
)
