"""Random small models of every family, made and saved by transformers, for import and export to be held against."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

VOCAB, HIDDEN, HEADS, FFN, POSITIONS = 53, 32, 4, 48, 64  # a vocabulary that no layout divides

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2_SHAPE = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_inner": FFN,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEOX_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
OPT_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 28}

# name: (transformers' configuration, its arguments)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2_SHAPE),
    "gpt_neox": ("GPTNeoXConfig", NEOX_SHAPE),
    "gpt_neox_one_after_the_other": ("GPTNeoXConfig", {**NEOX_SHAPE, "use_parallel_residual": False}),
    "gptj": ("GPTJConfig", {**GPT2_SHAPE, "rotary_dim": 4, "tie_word_embeddings": False}),
    "opt": ("OPTConfig", OPT_SHAPE),
    "llama": ("LlamaConfig", {**LLAMA_SHAPE, "attention_bias": True, "mlp_bias": True}),
    "llama_tied_one_kv_head": ("LlamaConfig", {**LLAMA_SHAPE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama3": ("LlamaConfig", {**LLAMA_SHAPE, "num_key_value_heads": 2, "rope_parameters": LLAMA3_SCALING}),
    "llama_linear": (
        "LlamaConfig",
        {**LLAMA_SHAPE, "rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}},
    ),
    "llama_yarn": (
        "LlamaConfig",
        {
            **LLAMA_SHAPE,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("MistralConfig", {**LLAMA_SHAPE, "num_key_value_heads": 2, "sliding_window": 7}),
    "qwen2_one_kv_head": ("Qwen2Config", {**LLAMA_SHAPE, "num_key_value_heads": 1, "use_sliding_window": False}),
    "qwen2_tied": ("Qwen2Config", {**LLAMA_SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2Config",
        {**LLAMA_SHAPE, "num_key_value_heads": 4}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3Config", {**LLAMA_SHAPE, "num_key_value_heads": 2, "head_dim": 12}),
    "qwen3_tied": (
        "Qwen3Config",
        {**LLAMA_SHAPE, "num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "mixtral": (
        "MixtralConfig",
        {**LLAMA_SHAPE, "num_key_value_heads": 2, "sliding_window": 7}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**LLAMA_SHAPE, **MIXTURE, "num_key_value_heads": 2, "shared_expert_intermediate_size": 20}
        | {"mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**LLAMA_SHAPE, **MIXTURE, "num_key_value_heads": 2, "head_dim": 12, "norm_topk_prob": True},
    ),
    "qwen2_moe_window": (
        "Qwen2MoeConfig",
        {**LLAMA_SHAPE, **MIXTURE, "num_key_value_heads": 4, "shared_expert_intermediate_size": 20, "qkv_bias": False}
        | {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
    ),
    "qwen3_moe_window": (
        "Qwen3MoeConfig",
        {**LLAMA_SHAPE, **MIXTURE, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}
        | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
}


def stirred(model: Any) -> Any:
    """Weights far from transformers' own small ones, norms and biases included: a term left out must show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.15 * noise)
    return model.eval()


def save_published(name: str, folder: Path, **changes: Any) -> Tensor:
    """Save a random model of a family; the logits [3, 40, vocab] that transformers gives for `fixed_tokens`."""
    import transformers

    config, arguments = PUBLISHED[name]
    arguments = {**arguments, **changes}
    model = stirred(transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments)))
    model.save_pretrained(folder)
    tokens = fixed_tokens(arguments["vocab_size"])
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits


def fixed_tokens(vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(2, vocab_size, (3, 40), generator=torch.Generator().manual_seed(5))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return tensors


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))
