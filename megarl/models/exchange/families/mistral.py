"""Mistral: a Llama whose attention is limited to a sliding window."""

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.families.llama import ENTRIES, IGNORED, PREFIX, read_shape, write_shape
from megarl.models.exchange.family import Family, Json


def read(config: Json) -> ModelConfig:
    """Convert Mistral's config.json to our shape; the window defaults to 4096 tokens."""
    return ModelConfig(**read_shape(config), sliding_window=config.get("sliding_window", 4096))


def write(model: ModelConfig) -> Json:
    """Return Mistral's config.json keys for a shape."""
    return {**write_shape(model), "sliding_window": model.sliding_window}


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=ENTRIES,
    ignored=IGNORED,
)
