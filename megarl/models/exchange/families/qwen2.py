"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, and sliding windows in all layers or none."""

from megarl.config.sections.model import ModelConfig
from megarl.errors import CheckpointError
from megarl.models.exchange.families.llama import ENTRIES, IGNORED, PREFIX, read_shape, write_shape
from megarl.models.exchange.family import Family, Json


def read_window(config: Json) -> int | None:
    """Return the sliding window of all layers; raise for models that mix windowed and full layers."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return None
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None:
        full = min(config.get("max_window_layers", 28), layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(set(kinds)) > 1:
        raise CheckpointError(
            "config.json has a sliding window in some layers only (max_window_layers, layer_types), which megarl "
            "cannot compute: set use_sliding_window to false if the context is shorter than the window",
            key="layer_types",
            value=kinds,
            where="config.json",
            offers={"use_sliding_window": [False]},
        )
    return int(config["sliding_window"]) if kinds[0] == "sliding_attention" else None


def write_window(model: ModelConfig) -> Json:
    """Return the config.json keys of the sliding window: in all layers or in none."""
    kind = "full_attention" if model.sliding_window is None else "sliding_attention"
    return {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "max_window_layers": model.num_layers if model.sliding_window is None else 0,
        "layer_types": [kind] * model.num_layers,
    }


def read(config: Json) -> ModelConfig:
    """Convert Qwen2's config.json to our shape: biases on queries, keys and values only."""
    return ModelConfig(**read_shape(config), qkv_bias=True, sliding_window=read_window(config))


def write(model: ModelConfig) -> Json:
    """Return Qwen2's config.json keys for a shape."""
    return {**write_shape(model), **write_window(model)}


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=ENTRIES,
    ignored=IGNORED,
)
