"""GPT-J: rotary positions on adjacent pairs, attention and MLP in parallel after one norm, a biased output layer."""

from megarl.config.sections.model import ModelConfig
from megarl.errors import CheckpointError
from megarl.models.exchange.family import Family, Json, activation, both, entry, share, their_activation
from megarl.models.exchange.views import query_key_value

LAYER, THEIRS = "decoder.layers.{}", "transformer.h.{}"


def read(config: Json) -> ModelConfig:
    """Convert GPT-J's config.json to our shape; `rotary_dim` must be a number."""
    rotated = config.get("rotary_dim", 64)
    if rotated is None:
        raise CheckpointError(
            "config.json has rotary_dim=null, which megarl cannot compute: only a number",
            key="rotary_dim",
            where="config.json",
        )
    return ModelConfig(
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        num_heads=config["n_head"],
        ffn_size=config.get("n_inner") or 4 * config["n_embd"],
        max_positions=config.get("n_positions", 2048),
        rope_percent=share(rotated, config["n_embd"] // config["n_head"]),
        rope_interleaved=True,
        norm="layernorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config, "activation_function", "gelu_new"),
        tie_embeddings=config.get("tie_word_embeddings", False),
        mlp_bias=True,
        lm_head_bias=True,
        parallel_residual="one_norm",
    )


def write(model: ModelConfig) -> Json:
    """Return GPT-J's config.json keys for a shape."""
    head_dim = model.head_width
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_width,
        "n_positions": model.max_positions,
        "rotary_dim": int(head_dim * model.rope_percent),
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": their_activation(model),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


FAMILY = Family(
    name="gptj",
    architectures=("GPTJForCausalLM", "GPTJModel"),
    prefix="transformer.",
    read=read,
    write=write,
    entries=(
        *entry("embedding.word_embeddings.weight", "transformer.wte.weight"),
        *both(f"{LAYER}.input_layernorm", f"{THEIRS}.ln_1"),
        *entry(
            f"{LAYER}.self_attention.linear_qkv.weight",
            *(f"{THEIRS}.attn.{name}_proj.weight" for name in "qkv"),
            views=query_key_value,
        ),
        *entry(f"{LAYER}.self_attention.linear_proj.weight", f"{THEIRS}.attn.out_proj.weight"),
        *both(f"{LAYER}.mlp.linear_fc1", f"{THEIRS}.mlp.fc_in"),
        *both(f"{LAYER}.mlp.linear_fc2", f"{THEIRS}.mlp.fc_out"),
        *both("decoder.final_layernorm", "transformer.ln_f"),
        *both("output_layer", "lm_head"),
    ),
    ignored={
        r"transformer\.h\.\d+\.attn\.(bias|masked_bias)": "a causal mask, not a weight",
        r"transformer\.h\.\d+\.attn\.embed_positions": "a table of sines, computed from the positions",
    },
)
