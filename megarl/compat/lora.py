"""PEFT's LoraConfig, and the keys of megarl that its fields are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.errors import ConfigError


def adapter_settings(peft: Any) -> dict[str, Any]:
    """Return the keys of an adapter for a LoraConfig, or for a mapping with its fields.

    Without target_modules, all linear layers have one; PEFT's choice depends on the model.
    """
    values = peft if isinstance(peft, Mapping) else vars(peft)
    targets = values.get("target_modules") or "all-linear"
    if isinstance(targets, str) and targets != "all-linear":
        raise ConfigError(
            f"peft_config.target_modules={targets!r} is a pattern: give a list of names, or all-linear",
            key="peft_config.target_modules",
            value=targets,
            offers={"peft_config.target_modules": ["all-linear"]},
        )
    return {
        "adapter.kind": "dora" if values.get("use_dora") else "lora",
        "adapter.rank": values.get("r", 8),
        "adapter.alpha": values.get("lora_alpha", 8),
        "adapter.dropout": values.get("lora_dropout") or 0.0,
        "adapter.rslora": bool(values.get("use_rslora")),
        "adapter.targets": [targets] if isinstance(targets, str) else sorted(targets),
    }
