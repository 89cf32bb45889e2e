"""Tiny random mixtures of experts, as transformers saves them, of odd sizes so that nothing fits by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.exchange.published import stirred

VOCAB, EOS = 103, 1
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "num_experts_per_tok": 3,
}
FINE = {"num_experts": 6, "moe_intermediate_size": 22}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 6}),
    "qwen2_moe": ("Qwen2MoeConfig", {**FINE, "shared_expert_intermediate_size": 26, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", {**FINE, "head_dim": 14, "norm_topk_prob": True}),
}
DENSE = {"mixtral": [], "qwen2_moe": [1], "qwen3_moe": []}
"""The layers of each kind that have a plain MLP."""


def make(kind: str, **changes: Any) -> Any:
    """A random model of a family."""
    name, arguments = KINDS[kind]
    settings = getattr(transformers, name)(**{**SHAPE, **arguments, **changes})
    torch.manual_seed(0)
    # Their grouped products refuse widths that are no multiple of 16 bytes.
    return stirred(transformers.AutoModelForCausalLM.from_config(settings, experts_implementation="eager"))


def save(kind: str, folder: Path) -> Any:
    """Save a random model of a family, and return it."""
    model = make(kind)
    model.save_pretrained(folder)
    return model
