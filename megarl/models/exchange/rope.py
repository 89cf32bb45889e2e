"""Rotary positions in config.json: `rope_parameters` of transformers 5, or older `rope_theta` and `rope_scaling`."""

import math
from typing import Any

from megarl.config.sections.model import SCALINGS, ModelConfig, RopeScalingConfig
from megarl.errors import CheckpointError
from megarl.models.exchange.family import Json, unsupported

KINDS = ("default", *SCALINGS)


def read_rope(config: Json, *, theta: float = 10000.0, theta_key: str = "rope_theta") -> Json:
    """Return our `rope_*` keys; `theta` and `theta_key` are the family's default base and the older name of its key."""
    rope: Json = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(
            "config.json has rotary positions that differ between layers, which megarl lacks",
            where="config.json",
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        raise CheckpointError(
            f"config.json has rope_type={kind!r}, which megarl does not support: choose from {', '.join(KINDS)}",
            key="rope_type",
            value=kind,
            where="config.json",
            offers={"rope_type": KINDS},
        )
    base: Any = rope.get("rope_theta", config.get(theta_key, config.get("rope_theta", theta)))
    fields: Json = {"rope_base": float(base)}
    if kind == "default":
        return fields
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    positions = int(original or config["max_position_embeddings"])
    factor = float(rope.get("factor") or config["max_position_embeddings"] / positions)
    scaling = RopeScalingConfig(kind, factor, original_positions=positions)
    if kind == "llama3":
        scaling.low_freq_factor = float(rope["low_freq_factor"])
        scaling.high_freq_factor = float(rope["high_freq_factor"])
    if kind == "yarn":
        _check_yarn(rope, factor)
    return fields | {"rope_scaling": scaling}


def write_rope(model: ModelConfig) -> Json:
    """Return `rope_parameters` in the format of transformers 5."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_base}
    rope: Json = {"rope_type": scaling.kind, "rope_theta": model.rope_base, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
    return rope


def _check_yarn(rope: Json, factor: float) -> None:
    """Raise for YaRN constants other than the paper's, which are built in."""
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    constants: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": usual}
    for key, value in constants.items():
        found = rope.get(key)
        if found is not None and not math.isclose(found, value, rel_tol=1e-6):
            raise unsupported(key, found, value, of="YaRN with ")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        raise CheckpointError(
            "config.json has YaRN with mscale and mscale_all_dim, which megarl cannot compute",
            key="mscale_all_dim",
            value=rope["mscale_all_dim"],
            where="config.json",
        )
