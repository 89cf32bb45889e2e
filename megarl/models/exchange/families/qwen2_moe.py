"""Qwen1.5-MoE and Qwen2-MoE: a Qwen2 with experts, a shared expert with a gate, and plain MLPs in some layers."""

from megarl.config.sections.model import ExpertsConfig, ModelConfig
from megarl.errors import CheckpointError
from megarl.models.exchange.families.llama import ENTRIES, IGNORED, LAYER, PREFIX, THEIRS, read_shape, write_shape
from megarl.models.exchange.families.mixtral import expert_entries
from megarl.models.exchange.families.qwen2 import read_window, write_window
from megarl.models.exchange.family import Family, Json, entry
from megarl.models.exchange.views import gate_and_up

SHARED = f"{LAYER}.mlp.shared_experts"
MIXTURE = expert_entries("mlp.gate", *(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")))


def read_experts(config: Json, *, shared: bool) -> ExpertsConfig:
    """Convert the keys of the experts, which the files of some versions name as Mixtral's.

    Args:
        shared: whether the family has a shared expert.
    """
    count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    plain, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    if not isinstance(plain, list) or not all(type(layer) is int for layer in plain):
        raise CheckpointError(
            f"config.json has mlp_only_layers={plain!r}, which is not a list of whole numbers: restore it",
            key="mlp_only_layers",
            value=plain,
            where="config.json",
        )
    layers = range(config["num_hidden_layers"])
    return ExpertsConfig(
        count=count,
        chosen=config["num_experts_per_tok"],
        ffn_size=_given(config, "moe_intermediate_size"),
        normalise=config.get("norm_topk_prob", False),
        shared_ffn_size=_given(config, "shared_expert_intermediate_size") if shared else None,
        dense_layers=[layer for layer in layers if layer in plain or (layer + 1) % step],
    )


def _given(config: Json, key: str) -> int:
    """Return a size that must not be null, which is another width in our shape; raise KeyError."""
    if config.get(key) is None:
        raise KeyError(key)
    return int(config[key])


def write_experts(model: ModelConfig) -> Json:
    """Return the config.json keys of the experts."""
    experts = model.experts or ExpertsConfig()
    shared = {} if experts.shared_ffn_size is None else {"shared_expert_intermediate_size": experts.shared_ffn_size}
    return {
        **shared,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": model.expert_width,
        "norm_topk_prob": experts.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(experts.dense_layers),
        "router_aux_loss_coef": experts.balance,
    }


def read(config: Json) -> ModelConfig:
    """Convert Qwen2-MoE's config.json to our shape."""
    if config.get("use_sliding_window") and config.get("sliding_window") and config.get("layer_types") is None:
        raise CheckpointError(
            "config.json has a sliding window and no layer_types, without which versions of transformers disagree on "
            "the layers that have it: add layer_types, or set use_sliding_window to false if the context is shorter "
            "than the window",
            key="layer_types",
            where="config.json",
            offers={"use_sliding_window": [False]},
        )
    experts, bias = read_experts(config, shared=True), config.get("qkv_bias", True)
    return ModelConfig(**read_shape(config), qkv_bias=bias, sliding_window=read_window(config), experts=experts)


def write(model: ModelConfig) -> Json:
    """Return Qwen2-MoE's config.json keys for a shape."""
    return {**write_shape(model), **write_window(model), **write_experts(model), "qkv_bias": model.qkv_bias}


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=(
        *ENTRIES,
        *MIXTURE,
        *entry(f"{SHARED}.gate_weight", f"{THEIRS}.mlp.shared_expert_gate.weight"),
        *entry(
            f"{SHARED}.linear_fc1.weight",
            *(f"{THEIRS}.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up")),
            views=gate_and_up,
        ),
        *entry(f"{SHARED}.linear_fc2.weight", f"{THEIRS}.mlp.shared_expert.down_proj.weight"),
    ),
    ignored=IGNORED,
)
