"""Mixtral: a Mistral whose MLPs are mixtures of experts. Qwen2-MoE and Qwen3-MoE share the functions here."""

from megarl.config.sections.model import ExpertsConfig, ModelConfig
from megarl.models.exchange.families.llama import ENTRIES, IGNORED, LAYER, PREFIX, THEIRS, read_shape, write_shape
from megarl.models.exchange.family import Entry, Family, Json, entry, require
from megarl.models.exchange.views import gate_and_up

EXPERT = f"{LAYER}.mlp.experts.local_experts.{{}}"


def expert_entries(router: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """Return the entries of router and experts. The arguments are the stored names within a layer; those of an expert's
    weights have `{}` for its number."""
    return (
        *entry(f"{LAYER}.mlp.router.weight", f"{THEIRS}.{router}.weight"),
        *entry(
            f"{EXPERT}.linear_fc1.weight",
            f"{THEIRS}.{gate}.weight",
            f"{THEIRS}.{up}.weight",
            views=gate_and_up,
        ),
        *entry(f"{EXPERT}.linear_fc2.weight", f"{THEIRS}.{down}.weight"),
    )


def read(config: Json) -> ModelConfig:
    """Convert Mixtral's config.json to our shape: the MLP's width is that of an expert."""
    require(config, "router_jitter_noise", 0.0, 0.0)
    experts = ExpertsConfig(count=config["num_local_experts"], chosen=config["num_experts_per_tok"])
    shape = read_shape(config, eps=1e-5, theta=1e6)
    return ModelConfig(**shape, sliding_window=config.get("sliding_window"), experts=experts)


def write(model: ModelConfig) -> Json:
    """Return Mixtral's config.json keys for a shape."""
    experts = model.experts or ExpertsConfig()
    return {
        **write_shape(model),
        "intermediate_size": model.expert_width,
        "sliding_window": model.sliding_window,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "router_aux_loss_coef": experts.balance,
    }


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM", "MixtralModel"),
    prefix=PREFIX,
    read=read,
    write=write,
    entries=(
        *(item for item in ENTRIES if ".mlp." not in item.ours),
        *expert_entries(
            "block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2"))
        ),
    ),
    ignored=IGNORED,
)
