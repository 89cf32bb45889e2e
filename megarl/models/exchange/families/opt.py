"""OPT: learned positions that start at 2, biases everywhere, tied embeddings. Post-norm models (350m) are rejected."""

from megarl.config.sections.model import ModelConfig
from megarl.errors import CheckpointError
from megarl.models.exchange.family import Family, Json, activation, both, entry, require, their_activation
from megarl.models.exchange.views import query_key_value

LAYER, THEIRS = "decoder.layers.{}", "model.decoder.layers.{}"
OFFSET = 2


def read(config: Json) -> ModelConfig:
    """Convert OPT's config.json to our shape; post-norm and embedding projections are rejected."""
    if not config.get("do_layer_norm_before", True):
        raise CheckpointError(
            "config.json has do_layer_norm_before=false: OPT-350m puts its norms after the residual sum, which megarl "
            "does not compute; take another size of OPT",
            key="do_layer_norm_before",
            value=False,
            where="config.json",
        )
    hidden = config["hidden_size"]
    require(config, "word_embed_proj_dim", hidden, hidden)
    require(config, "_remove_final_layer_norm", False, False)
    require(config, "layer_norm_elementwise_affine", True, True)
    bias = config.get("enable_bias", True)
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=config["num_attention_heads"],
        ffn_size=config["ffn_dim"],
        max_positions=config.get("max_position_embeddings", 2048),
        position="learned",
        position_offset=OFFSET,
        norm="layernorm",
        activation=activation(config, "activation_function", "relu"),
        tie_embeddings=config.get("tie_word_embeddings", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def write(model: ModelConfig) -> Json:
    """Return OPT's config.json keys for a shape."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "word_embed_proj_dim": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "ffn_dim": model.ffn_width,
        "max_position_embeddings": model.max_positions,
        "activation_function": their_activation(model),
        "do_layer_norm_before": True,
        "enable_bias": model.mlp_bias,
        "init_std": model.init_std,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
    }


FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM", "OPTModel"),
    prefix="model.",
    read=read,
    write=write,
    entries=(
        *entry("embedding.word_embeddings.weight", "model.decoder.embed_tokens.weight"),
        *entry("embedding.position_embeddings.weight", "model.decoder.embed_positions.weight"),
        *both(f"{LAYER}.input_layernorm", f"{THEIRS}.self_attn_layer_norm"),
        *both(
            f"{LAYER}.self_attention.linear_qkv",
            *(f"{THEIRS}.self_attn.{name}_proj" for name in "qkv"),
            views=query_key_value,
        ),
        *both(f"{LAYER}.self_attention.linear_proj", f"{THEIRS}.self_attn.out_proj"),
        *both(f"{LAYER}.pre_mlp_layernorm", f"{THEIRS}.final_layer_norm"),
        *both(f"{LAYER}.mlp.linear_fc1", f"{THEIRS}.fc1"),
        *both(f"{LAYER}.mlp.linear_fc2", f"{THEIRS}.fc2"),
        *both("decoder.final_layernorm", "model.decoder.final_layer_norm"),
        *entry("output_layer.weight", "lm_head.weight"),
    ),
)
