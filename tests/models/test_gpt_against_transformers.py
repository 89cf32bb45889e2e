"""Tiny random models of published families, built by transformers: our GPT must give the same log-probs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.schema import ModelConfig
from megarl.models.config import GPTConfig, Rope
from megarl.models.gpt import GPT
from megarl.models.rotary import inverse_frequencies
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from tests.worlds import Worlds

VOCAB, HIDDEN, HEADS, FFN, POSITIONS = 53, 32, 4, 48, 64
Weights = dict[str, Tensor]


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> Tensor:
    """[heads * head_dim, ...] projections to Megatron's rows: per key-value head its queries, its key, its value."""
    parts = [part.reshape(kv_heads, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def layer_names(there: Weights, theirs: str, ours: dict[str, str], layers: int) -> Weights:
    """Tensors `theirs.format(i) + suffix` under the names of our layer i."""
    return {
        f"decoder.layers.{i}.{mine}": there[theirs.format(i) + suffix]
        for i in range(layers)
        for mine, suffix in ours.items()
        if theirs.format(i) + suffix in there
    }


def both(mine: str, theirs: str) -> dict[str, str]:
    """Weight and bias of one module."""
    return {f"{mine}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def from_gpt2(there: Weights) -> Weights:
    names = {
        **both("input_layernorm", "ln_1"),
        **both("pre_mlp_layernorm", "ln_2"),
        **both("self_attention.linear_proj", "attn.c_proj"),
        **both("mlp.linear_fc1", "mlp.c_fc"),
        **both("mlp.linear_fc2", "mlp.c_proj"),
    }
    here = layer_names(there, "transformer.h.{}.", names, 2)
    # Their linear layers are stored [in, out].
    here = {name: value.t() if "linear" in name and name.endswith("weight") else value for name, value in here.items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            whole = there[f"transformer.h.{i}.attn.c_attn.{kind}"].t()
            if kind == "bias":
                whole = there[f"transformer.h.{i}.attn.c_attn.bias"]
            here[f"decoder.layers.{i}.self_attention.linear_qkv.{kind}"] = fuse_qkv(*whole.chunk(3), HEADS)
    return here | {
        "embedding.word_embeddings.weight": there["transformer.wte.weight"],
        "embedding.position_embeddings.weight": there["transformer.wpe.weight"],
        "decoder.final_layernorm.weight": there["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": there["transformer.ln_f.bias"],
    }


def from_neox(there: Weights) -> Weights:
    names = {
        **both("input_layernorm", "input_layernorm"),
        **both("pre_mlp_layernorm", "post_attention_layernorm"),
        **both("self_attention.linear_qkv", "attention.query_key_value"),  # stored per head already
        **both("self_attention.linear_proj", "attention.dense"),
        **both("mlp.linear_fc1", "mlp.dense_h_to_4h"),
        **both("mlp.linear_fc2", "mlp.dense_4h_to_h"),
    }
    return layer_names(there, "gpt_neox.layers.{}.", names, 2) | {
        "embedding.word_embeddings.weight": there["gpt_neox.embed_in.weight"],
        "decoder.final_layernorm.weight": there["gpt_neox.final_layer_norm.weight"],
        "decoder.final_layernorm.bias": there["gpt_neox.final_layer_norm.bias"],
        # its name until transformers 5.x called it as everywhere else
        "output_layer.weight": there["lm_head.weight" if "lm_head.weight" in there else "embed_out.weight"],
    }


def from_gptj(there: Weights) -> Weights:
    names = {
        **both("input_layernorm", "ln_1"),
        **both("self_attention.linear_proj", "attn.out_proj"),
        **both("mlp.linear_fc1", "mlp.fc_in"),
        **both("mlp.linear_fc2", "mlp.fc_out"),
    }
    here = layer_names(there, "transformer.h.{}.", names, 2)
    for i in range(2):
        parts = [there[f"transformer.h.{i}.attn.{name}_proj.weight"] for name in "qkv"]
        here[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = fuse_qkv(*parts, HEADS)
    return here | {
        "embedding.word_embeddings.weight": there["transformer.wte.weight"],
        "decoder.final_layernorm.weight": there["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": there["transformer.ln_f.bias"],
        "output_layer.weight": there["lm_head.weight"],
        "output_layer.bias": there["lm_head.bias"],
    }


def from_llama(there: Weights) -> Weights:
    """Llama, Mistral, Qwen2 and Qwen3; the heads are told by the shapes."""
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    here = layer_names(there, "model.layers.{}.", names, 2)
    for i in range(2):
        their, our = f"model.layers.{i}.", f"decoder.layers.{i}."
        kv_heads = (
            HEADS
            * there[f"{their}self_attn.k_proj.weight"].shape[0]
            // there[f"{their}self_attn.q_proj.weight"].shape[0]
        )
        for kind in ("weight", "bias"):
            if f"{their}self_attn.q_proj.{kind}" in there:
                parts = [there[f"{their}self_attn.{name}_proj.{kind}"] for name in "qkv"]
                here[f"{our}self_attention.linear_qkv.{kind}"] = fuse_qkv(*parts, kv_heads)
        gate_up = [there[f"{their}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        here[f"{our}mlp.linear_fc1.weight"] = torch.cat(gate_up)
    here |= {
        "embedding.word_embeddings.weight": there["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": there["model.norm.weight"],
    }
    return here | {"output_layer.weight": there["lm_head.weight"]}


def from_opt(there: Weights) -> Weights:
    names = {
        **both("input_layernorm", "self_attn_layer_norm"),
        **both("pre_mlp_layernorm", "final_layer_norm"),
        **both("self_attention.linear_proj", "self_attn.out_proj"),
        **both("mlp.linear_fc1", "fc1"),
        **both("mlp.linear_fc2", "fc2"),
    }
    here = layer_names(there, "model.decoder.layers.{}.", names, 2)
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [there[f"model.decoder.layers.{i}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            here[f"decoder.layers.{i}.self_attention.linear_qkv.{kind}"] = fuse_qkv(*parts, HEADS)
    return here | {
        "embedding.word_embeddings.weight": there["model.decoder.embed_tokens.weight"],
        "embedding.position_embeddings.weight": there["model.decoder.embed_positions.weight"],
        "decoder.final_layernorm.weight": there["model.decoder.final_layer_norm.weight"],
        "decoder.final_layernorm.bias": there["model.decoder.final_layer_norm.bias"],
    }


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
OUR_LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "norm_eps": 1e-6}

# family: (name of transformers' configuration, its arguments, how weights map, our ModelConfig)
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Weights], dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": 2, "n_head": HEADS, "n_positions": POSITIONS,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        from_gpt2,
        {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "tie_embeddings": True,
         "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2,
         "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        from_neox,
        {"rope_percent": 0.5, "norm": "layernorm", "activation": "gelu", "qkv_bias": True, "out_bias": True,
         "mlp_bias": True, "parallel_residual": "two_norms"},
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": 2, "n_head": HEADS, "n_positions": POSITIONS,
         "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False},
        from_gptj,
        {"rope_percent": 0.5, "rope_interleaved": True, "norm": "layernorm", "activation": "gelu_tanh",
         "mlp_bias": True, "lm_head_bias": True, "parallel_residual": "one_norm"},
    ),
    "llama3": (
        "LlamaConfig",
        {**LLAMA_SHAPE, "num_key_value_heads": 2, "rope_parameters": LLAMA3_SCALING},
        from_llama,
        {**OUR_LLAMA, "num_kv_heads": 2, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_positions": 16},
    ),
    "llama_yarn": (
        "LlamaConfig",
        {**LLAMA_SHAPE, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                            "original_max_position_embeddings": 16}},
        from_llama,
        {**OUR_LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 16},
    ),
    "qwen2": (
        "Qwen2Config",
        {**LLAMA_SHAPE, "num_key_value_heads": 1, "use_sliding_window": False},
        from_llama,
        {**OUR_LLAMA, "num_kv_heads": 1, "qkv_bias": True},
    ),
    "qwen3": (
        "Qwen3Config",
        {**LLAMA_SHAPE, "num_key_value_heads": 2, "head_dim": 12, "use_sliding_window": False},
        from_llama,
        {**OUR_LLAMA, "num_kv_heads": 2, "head_dim": 12, "qk_norm": True},
    ),
    "mistral": (
        "MistralConfig",
        {**LLAMA_SHAPE, "num_key_value_heads": 2, "sliding_window": 7},
        from_llama,
        {**OUR_LLAMA, "num_kv_heads": 2, "sliding_window": 7},
    ),
    "opt": (
        "OPTConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": FFN,
         "num_hidden_layers": 2, "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS, "dropout": 0.0,
         "attention_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0},
        from_opt,
        {"position": "learned", "position_offset": 2, "norm": "layernorm", "activation": "relu", "tie_embeddings": True,
         "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
}  # fmt: skip


def our_gpt(shape: dict[str, Any]) -> GPT:
    """A whole model in a world of one."""
    grid = Grid(Layout(), start_world())
    model = ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_heads": HEADS,
            "ffn_size": FFN,
            "max_positions": POSITIONS,
            **shape,
        }
    )
    gpt = GPT(GPTConfig.build(model, grid.layout, vocab_size=VOCAB), grid)
    gpt.initialise(grid, 1)
    gpt.eval()
    return gpt


def load(gpt: GPT, weights: Weights) -> None:
    """Every parameter from `weights`, the vocabulary's padding with numbers that would show if they were used."""
    parameters = dict(gpt.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.startswith(("embedding.word", "output_layer")):
                parameter.fill_(9.0)
                parameter[: weights[name].shape[0]] = weights[name]
            else:
                assert parameter.shape == weights[name].shape, name
                parameter.copy_(weights[name])


def token_logprobs(gpt: GPT, tokens: Tensor, positions: Tensor | None = None, **more: Tensor) -> Tensor:
    """[batch, time] log-probs of all tokens but the first."""
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        hidden = gpt({"tokens": tokens, "positions": positions, **more})
        return gpt.logprobs(hidden, tokens, torch.ones(tokens.shape)).logprobs


def stirred(model: Any) -> Any:
    """Weights far from transformers' own small ones, norms and biases included: a term left out must show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.15 * noise)
    return model.eval()


def compare_with_transformers(family: str) -> tuple[float, float]:
    """The largest difference of a log-prob, and how far theirs spread (a flat model would prove nothing)."""
    import transformers

    config_name, arguments, mapping, shape = FAMILIES[family]
    theirs = stirred(transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_name)(**arguments)))
    gpt = our_gpt(shape)
    load(gpt, mapping(dict(theirs.state_dict())))
    tokens = torch.randint(2, VOCAB, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    wanted = torch.log_softmax(logits.float(), -1).gather(2, tokens[:, 1:, None])[..., 0]
    found = token_logprobs(gpt, tokens)[:, 1:]
    return float((found - wanted).abs().max()), float(wanted.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers(worlds: Worlds, family: str) -> None:
    ((difference, spread),) = worlds.run(1, compare_with_transformers, family)
    assert difference < 1e-5
    assert spread > 0.3


@pytest.mark.parametrize(
    "rope",
    [
        Rope(scaling="linear", factor=4.0),
        Rope(scaling="linear", factor=2.5, base=500000.0),
        Rope(scaling="llama3", factor=8.0, original_positions=64),
        Rope(scaling="llama3", factor=32.0, low_freq_factor=1.5, high_freq_factor=6.0, original_positions=8192),
        Rope(scaling="yarn", factor=4.0, original_positions=64),
        Rope(scaling="yarn", factor=40.0, base=500000.0, original_positions=4096),
        Rope(scaling="yarn", factor=1.0, original_positions=4096),
    ],
    ids=lambda rope: f"{rope.scaling}-{rope.factor:g}",
)
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_stretched_frequencies_are_those_of_transformers(rope: Rope, dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.base, "factor": rope.factor}
    if rope.scaling == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.original_positions is not None:
        parameters["original_max_position_embeddings"] = rope.original_positions
    config = LlamaConfig(head_dim=dim, max_position_embeddings=2**20, rope_parameters=parameters)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu")
    found, factor = inverse_frequencies(rope, dim)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0.0)
    assert factor == pytest.approx(wanted_factor, rel=1e-7)


def packed_and_alone(shape: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Log-probs of two documents in one padded row, of each alone, and the effect of leaving segment_ids out."""
    gpt = our_gpt({**shape, "init_std": 0.15})
    first, second = (torch.randint(2, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 14))
    padding = torch.zeros(1, 5, dtype=torch.long)
    tokens = torch.cat([first, second, padding], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14), torch.zeros(5, dtype=torch.long)])[None]
    segments = torch.tensor([[1] * 9 + [2] * 14 + [0] * 5])
    packed = token_logprobs(gpt, tokens, positions, segment_ids=segments)
    together = token_logprobs(gpt, tokens, positions)
    alone = torch.cat([token_logprobs(gpt, document) for document in (first, second)], 1)
    inside = [i for i in range(23) if i not in (0, 9)]  # a document's first token has no state of its own before it
    return packed[0, inside], alone[0, inside], packed[0], float((together - packed)[0, 10:23].abs().max())


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "position_offset": 2}, {"sliding_window": 4}], ids=str)
def test_packed_documents_do_not_see_each_other(worlds: Worlds, shape: dict[str, Any]) -> None:
    ((packed, alone, whole_row, effect),) = worlds.run(1, packed_and_alone, shape)
    torch.testing.assert_close(packed, alone, rtol=0.0, atol=1e-5)
    assert torch.isfinite(whole_row).all()  # padding included
    assert effect > 1e-2  # without segment_ids they do see each other: the comparison can fail
