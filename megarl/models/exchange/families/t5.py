"""T5, T5 1.1, Flan-T5 and UL2: an encoder and a decoder with relative positions, RMSNorm and no biases."""

from typing import Any

from megarl.config.sections.model import EncoderConfig, ModelConfig
from megarl.models.exchange.family import Entry, Family, Json, entry, unsupported
from megarl.models.exchange.views import gate_and_up, key_value, query_key_value

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gated-gelu": "geglu", "gated-silu": "swiglu"}
LONGEST = 16384
"""Context length of prompt and response together, unless config.json has our key for it. Relative positions have no
limit."""
_STARTS = ("decoder_start_token_id", "pad_token_id")
"""Keys of the start token, the first that is there."""
IGNORED = {
    r"(encoder|decoder)\.embed_tokens\.weight": "the shared embedding once more",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": "never read",
}


def _block(ours: str, theirs: str, mlp: int) -> tuple[Entry, ...]:
    """Return the entries of the layers of a part whose MLP is sublayer `mlp`."""
    attention, dense = f"{theirs}.layer.0.SelfAttention", f"{theirs}.layer.{mlp}.DenseReluDense"
    return (
        *entry(f"{ours}.input_layernorm.weight", f"{theirs}.layer.0.layer_norm.weight"),
        *entry(
            f"{ours}.self_attention.linear_qkv.weight",
            *(f"{attention}.{name}.weight" for name in "qkv"),
            views=query_key_value,
        ),
        *entry(f"{ours}.self_attention.linear_proj.weight", f"{attention}.o.weight"),
        *entry(f"{ours}.self_attention.relative_positions", f"{attention}.relative_attention_bias.weight"),
        *entry(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.layer.{mlp}.layer_norm.weight"),
        *entry(f"{ours}.mlp.linear_fc1.weight", f"{dense}.wi.weight"),
        *entry(
            f"{ours}.mlp.linear_fc1.weight",
            f"{dense}.wi_0.weight",
            f"{dense}.wi_1.weight",
            views=gate_and_up,
            gated=True,
        ),
        *entry(f"{ours}.mlp.linear_fc2.weight", f"{dense}.wo.weight"),
    )


_DECODER, _CROSS = "decoder.layers.{}", "decoder.block.{}.layer.1.EncDecAttention"
ENTRIES = (
    *entry("embedding.word_embeddings.weight", "shared.weight"),
    *_block("encoder.layers.{}", "encoder.block.{}", mlp=1),
    *entry("encoder.layers.{}.final_layernorm.weight", "encoder.final_layer_norm.weight"),
    *_block(_DECODER, "decoder.block.{}", mlp=2),
    *entry(f"{_DECODER}.pre_cross_layernorm.weight", "decoder.block.{}.layer.1.layer_norm.weight"),
    *entry(f"{_DECODER}.cross_attention.linear_q.weight", f"{_CROSS}.q.weight"),
    *entry(f"{_DECODER}.cross_attention.linear_kv.weight", f"{_CROSS}.k.weight", f"{_CROSS}.v.weight", views=key_value),
    *entry(f"{_DECODER}.cross_attention.linear_proj.weight", f"{_CROSS}.o.weight"),
    *entry("decoder.final_layernorm.weight", "decoder.final_layer_norm.weight"),
    *entry("output_layer.weight", "lm_head.weight"),
)


def read(config: Json) -> ModelConfig:
    """Convert the config.json of a T5 to our shape."""
    theirs = config.get("feed_forward_proj", "relu")
    if theirs not in ACTIVATIONS:
        raise unsupported("feed_forward_proj", theirs, sorted(ACTIVATIONS))
    return ModelConfig(
        num_layers=config.get("num_decoder_layers") or config["num_layers"],
        hidden_size=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        ffn_size=config["d_ff"],
        max_positions=config.get("max_positions") or LONGEST,
        position="relative",
        norm="rmsnorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        activation=ACTIVATIONS[theirs],
        tie_embeddings=config.get("tie_word_embeddings", True),
        encoder=EncoderConfig(
            num_layers=config["num_layers"],
            buckets=config.get("relative_attention_num_buckets", 32),
            longest_distance=config.get("relative_attention_max_distance", 128),
            start_id=next((config[key] for key in _STARTS if config.get(key) is not None), 0),
            # Transformers 4 scales where embeddings are tied; 5 writes them as tied always, and whether it scales.
            scale_outputs=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
        ),
    )


def write(model: ModelConfig) -> Json:
    """Return the config.json keys of a T5 for a shape."""
    encoder = model.encoder or EncoderConfig(num_layers=1)
    theirs: dict[str, Any] = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "num_layers": encoder.num_layers,
        "num_decoder_layers": model.num_layers,
        "d_model": model.hidden_size,
        "num_heads": model.num_heads,
        "d_kv": model.head_width,
        "d_ff": model.ffn_width,
        "feed_forward_proj": theirs.get(model.activation, model.activation),
        "layer_norm_epsilon": model.norm_eps,
        "relative_attention_num_buckets": encoder.buckets,
        "relative_attention_max_distance": encoder.longest_distance,
        "decoder_start_token_id": encoder.start_id,
        "scale_decoder_outputs": encoder.scale_outputs,
        "dropout_rate": model.dropout,
        "is_encoder_decoder": True,
        **({} if model.max_positions == LONGEST else {"max_positions": model.max_positions}),
    }


FAMILY = Family(
    name="t5",
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    prefix="",
    read=read,
    write=write,
    entries=ENTRIES,
    ignored=IGNORED,
    trunk="T5Model",  # T5ForSequenceClassification has two layers above it, and gives the encoder the response as well
)
