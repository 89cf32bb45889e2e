"""Qwen3: a Llama whose queries and keys are normalised per head, and whose head width is configured separately."""

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.families.llama import ENTRIES, IGNORED, LAYER, PREFIX, THEIRS, read_shape, write_shape
from megarl.models.exchange.families.qwen2 import read_window, write_window
from megarl.models.exchange.family import Family, Json, entry


def read(config: Json) -> ModelConfig:
    """Convert Qwen3's config.json to our shape; the head width defaults to 128."""
    bias = config.get("attention_bias", False)
    shape = {**read_shape(config), "head_dim": config.get("head_dim", 128)}
    return ModelConfig(**shape, qk_norm=True, qkv_bias=bias, out_bias=bias, sliding_window=read_window(config))


def write(model: ModelConfig) -> Json:
    """Return Qwen3's config.json keys for a shape."""
    return {**write_shape(model), **write_window(model), "attention_bias": model.qkv_bias}


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=(
        *ENTRIES,
        *entry(f"{LAYER}.self_attention.q_layernorm.weight", f"{THEIRS}.self_attn.q_norm.weight"),
        *entry(f"{LAYER}.self_attention.k_layernorm.weight", f"{THEIRS}.self_attn.k_norm.weight"),
    ),
    ignored=IGNORED,
)
