"""GPT-NeoX and Pythia: rotary positions on a part of each head, attention and MLP in parallel, each with its norm."""

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.family import Family, Json, activation, both, entry, share, their_activation
from megarl.models.exchange.rope import read_rope, write_rope

LAYER, THEIRS = "decoder.layers.{}", "gpt_neox.layers.{}"


def read(config: Json) -> ModelConfig:
    """Convert GPT-NeoX's config.json to our shape; its QKV bias and output biases share `attention_bias`."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    percent = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    bias = config.get("attention_bias", True)
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        ffn_size=config["intermediate_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        **read_rope(config, theta_key="rotary_emb_base"),
        rope_percent=share(int(head_dim * percent), head_dim),
        norm="layernorm",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=activation(config, "hidden_act", "gelu"),
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        parallel_residual="two_norms" if config.get("use_parallel_residual", True) else "none",
    )


def write(model: ModelConfig) -> Json:
    """Return GPT-NeoX's config.json keys for a shape."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_width,
        "max_position_embeddings": model.max_positions,
        "rope_parameters": {**write_rope(model), "partial_rotary_factor": model.rope_percent},
        "layer_norm_eps": model.norm_eps,
        "hidden_act": their_activation(model),
        "attention_bias": model.qkv_bias,
        "use_parallel_residual": model.parallel_residual == "two_norms",
        "attention_dropout": model.dropout,
        "hidden_dropout": model.dropout,
    }


FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    prefix="gpt_neox.",
    read=read,
    write=write,
    entries=(
        *entry("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight"),
        *both(f"{LAYER}.input_layernorm", f"{THEIRS}.input_layernorm"),
        # Stored per head as query, key, value: with one key-value head per query head this is our order.
        *both(f"{LAYER}.self_attention.linear_qkv", f"{THEIRS}.attention.query_key_value"),
        *both(f"{LAYER}.self_attention.linear_proj", f"{THEIRS}.attention.dense"),
        *both(f"{LAYER}.pre_mlp_layernorm", f"{THEIRS}.post_attention_layernorm"),
        *both(f"{LAYER}.mlp.linear_fc1", f"{THEIRS}.mlp.dense_h_to_4h"),
        *both(f"{LAYER}.mlp.linear_fc2", f"{THEIRS}.mlp.dense_4h_to_h"),
        *both("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
        *entry("output_layer.weight", "embed_out.weight"),
    ),
    ignored={
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)": "a causal mask, not a weight",
        r"gpt_neox\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq": "rotary frequencies, computed from the base",
    },
    renamed={"lm_head.weight": "embed_out.weight"},  # its name inside transformers from 5.x on
)
