"""Qwen3-MoE: a Qwen3 with experts, and plain MLPs in some layers."""

from megarl.config.sections.model import ModelConfig
from megarl.models.exchange.families import qwen3
from megarl.models.exchange.families.llama import IGNORED, PREFIX
from megarl.models.exchange.families.qwen2_moe import MIXTURE, read_experts, write_experts
from megarl.models.exchange.family import Family, Json


def read(config: Json) -> ModelConfig:
    """Convert Qwen3-MoE's config.json to our shape."""
    model = qwen3.read({**config, "layer_types": None, "max_window_layers": 0})  # a window is in all layers
    model.experts = read_experts(config, shared=False)
    return model


def write(model: ModelConfig) -> Json:
    """Return Qwen3-MoE's config.json keys for a shape."""
    return {**qwen3.write(model), **write_experts(model)}


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=(*qwen3.FAMILY.entries, *MIXTURE),
    ignored=IGNORED,
)
