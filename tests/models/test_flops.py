import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import ExpertsConfig, ModelConfig
from megarl.models.exchange.adapters import new_spec
from megarl.models.flops import (
    adapter_weights,
    flops_per_token,
    forward_flops_per_token,
    idle_weights,
    layer_weights,
    mean_keys,
)

SMALL = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_size": 16}


def test_layer_weights_by_hand():
    # query, key, value, output: 4 * 8*8; gate, up, down: 3 * 8*16
    assert layer_weights(ModelConfig(**SMALL, activation="swiglu")) == 256 + 384
    # two matrices without a gate
    assert layer_weights(ModelConfig(**SMALL, activation="gelu")) == 256 + 256


def test_grouped_heads_and_wide_heads_by_hand():
    # query and output: 2 * 8 * (4 heads * 6); key and value: 2 * 8 * (1 head * 6); MLP 4 * hidden: 2 * 8*32
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=4, num_kv_heads=1, head_dim=6, activation="relu")
    assert layer_weights(model) == 384 + 96 + 512


def test_flops_by_hand():
    model = ModelConfig(**SMALL, activation="gelu")
    # weights: 2 layers * 512, output layer 8 * 10; keys seen by 7 tokens: (1 + ... + 7) / 7 = 4
    # forward: 2 * (1024 + 80) + 2 layers * 4 * 8 * 4 = 2208 + 256; training is three times that
    assert flops_per_token(model, vocab_size=10, length=7) == 3 * (2208 + 256)


def test_long_sequences_approach_the_familiar_formula():
    model = ModelConfig(num_layers=12, hidden_size=768, num_heads=12, activation="gelu")
    length, weights = 4096, 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(model, 50257, length) == pytest.approx(6 * weights + 12 * 12 * 768 * length / 2, rel=1e-4)


def test_keys_seen_through_a_sliding_window():
    assert mean_keys(4) == 2.5
    assert mean_keys(4, window=4) == 2.5
    assert mean_keys(4, window=9) == 2.5
    assert mean_keys(5, window=2) == (1 + 2 + 2 + 2 + 2) / 5
    narrow, full = ModelConfig(**SMALL, sliding_window=2), ModelConfig(**SMALL)
    # 2 layers * 12 * hidden 8 per key and token
    saved = flops_per_token(full, 10, 5) - flops_per_token(narrow, 10, 5)
    assert saved == pytest.approx(2 * 12 * 8 * (3.0 - 1.8))


def test_frozen_layers_run_forward_only():
    whole = flops_per_token(ModelConfig(**SMALL), 10, 7)
    last = flops_per_token(ModelConfig(**SMALL, num_layers_unfrozen=1), 10, 7)
    layer = 2 * layer_weights(ModelConfig(**SMALL)) + 4 * 8 * 4
    assert whole - last == 2 * layer
    assert flops_per_token(ModelConfig(**SMALL, num_layers_unfrozen=2), 10, 7) == whole


def test_frozen_weights_beside_adapters_need_no_gradients():
    model = ModelConfig(**SMALL, activation="swiglu")
    spec = new_spec(AdapterConfig(rank=3), model, None)
    # inputs of q, k, v, o, gate, up, down, and as many rows: 7 factors of 3 on both sides
    assert adapter_weights(model, spec) == 2 * (3 * (6 * 8 + 16) + 3 * (4 * 8 + 2 * 16 + 8))
    products, attention, output = 2 * 2 * layer_weights(model), 2 * 4 * 8 * 4, 2 * 8 * 10
    factors = 2 * adapter_weights(model, spec)
    assert flops_per_token(model, 10, 7, spec) == 2 * products + 3 * attention + 3 * factors + 2 * output
    assert forward_flops_per_token(model, 10, 7, spec) == products + attention + factors + output
    assert forward_flops_per_token(model, 10, 7) == flops_per_token(model, 10, 7) / 3
    some = new_spec(AdapterConfig(rank=3, targets=["q_proj"]), model, None)
    assert adapter_weights(model, some) == 2 * 3 * (8 + 8)


def test_of_a_mixture_the_weights_that_compute_a_token_count():
    experts = ExpertsConfig(count=6, chosen=2, ffn_size=4, shared_ffn_size=5, dense_layers=[0])
    model = ModelConfig(**SMALL, activation="swiglu", experts=experts)
    # query, key, value, output; gate, up, down of the plain MLP
    assert layer_weights(model, 0) == 256 + 384
    # router; two experts; the shared one, and its gate
    assert layer_weights(model, 1) == 256 + 8 * 6 + 2 * 3 * 8 * 4 + 3 * 8 * 5 + 8
    assert idle_weights(model) == 4 * 3 * 8 * 4
    assert idle_weights(ModelConfig(**SMALL)) == 0
    forward = 2 * (640 + 256 + 48 + 192 + 120 + 8 + 80) + 2 * 4 * 8 * 4
    assert forward_flops_per_token(model, 10, 7) == forward
    assert flops_per_token(model, 10, 7) == 3 * forward
    frozen = flops_per_token(ModelConfig(**SMALL, activation="swiglu", experts=experts, num_layers_unfrozen=1), 10, 7)
    assert 3 * forward - frozen == 2 * (2 * 640 + 4 * 8 * 4)
    adapted = new_spec(AdapterConfig(rank=3), model, None)
    # beside attention in both layers, the plain MLP (16 wide) in one, and the shared expert (5 wide) in the other
    factors = 2 * 3 * 4 * (8 + 8) + 3 * (2 * 8 + 16 + 2 * 16 + 8) + 3 * (2 * 8 + 5 + 2 * 5 + 8)
    assert adapter_weights(model, adapted) == factors
    weights = 640 + 256 + 48 + 192 + 120 + 8
    assert flops_per_token(model, 10, 7, adapted) == 2 * 2 * weights + 3 * 2 * 128 + 3 * 2 * factors + 2 * 2 * 80


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_agrees_with_what_torch_counts_in_a_llama(kv_heads):
    """Torch counts attention over all pairs of tokens, so the masked half is added to ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, time, vocab = 2, 16, 50
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config)
    tokens = torch.randint(vocab, (batch, time))
    with FlopCounterMode(display=False) as counter:
        # Embeddings that need a gradient, as in training: the first layer's backward pass is then whole.
        llama(input_ids=tokens).logits.sum().backward()
    model = ModelConfig(
        num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=kv_heads, ffn_size=48, activation="swiglu"
    )
    attention = 3 * 12 * 32
    all_pairs = flops_per_token(model, vocab, time) + attention * (time - mean_keys(time))
    assert counter.get_total_flops() == batch * time * all_pairs


def test_agrees_with_what_torch_counts_in_a_mixtral():
    """Torch counts attention over all pairs of tokens, so the masked half is added to ours."""
    from transformers import MixtralConfig, MixtralForCausalLM

    batch, time, vocab = 2, 16, 50
    config = MixtralConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    mixtral = MixtralForCausalLM(config)
    tokens = torch.randint(vocab, (batch, time))
    with FlopCounterMode(display=False) as counter:
        mixtral(input_ids=tokens).logits.sum().backward()
    model = ModelConfig(
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=48,
        activation="swiglu",
        experts=ExpertsConfig(count=5, chosen=2),
    )
    attention = 3 * 12 * 32
    all_pairs = flops_per_token(model, vocab, time) + attention * (time - mean_keys(time))
    assert counter.get_total_flops() == batch * time * all_pairs
