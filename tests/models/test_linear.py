"""Gradients that our CPU layers put straight into Megatron's buffers are those that autograd would have handed over."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.models.linear import affine
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.cpu import needed
from megarl.parallel.device import CPU, assumed
from megarl.parallel.engine import Engine
from megarl.parallel.vocab import VocabShard, vocab_stats
from tests.parallel.engines import batches, small_engine
from tests.worlds import Worlds

pytestmark = pytest.mark.skipif(not needed(), reason="these layers are used on machines without a GPU")

GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "tie_embeddings": True,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}
LLAMA = {"num_kv_heads": 2}


def buffered(engine: Engine) -> dict[str, Tensor]:
    """Gradients in Megatron's buffers after one step over several microbatches."""
    engine.train_step(batches(engine, step=0), cross_entropy, count_targets)
    return {name: parameter.main_grad.clone() for name, parameter in engine.parameters()}


def handed_over(engine: Engine) -> dict[str, Tensor]:
    """The same by plain autograd, over an engine without buffers."""
    (model,) = engine.models
    for _, parameter in engine.parameters():
        parameter.requires_grad_(True)
    microbatches = batches(engine, step=0)
    counts = engine.count(microbatches, count_targets)
    for batch in microbatches:
        loss, _ = cross_entropy(model, model(batch), batch, counts)
        loss.backward()
    return {name: parameter.grad for name, parameter in engine.parameters()}


def both(model: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = small_engine({}, model)
    in_buffers = buffered(engine)
    engine.grid.close()  # one grid is live at a time
    engine = small_engine({}, model, train=False)
    engine.train()
    return in_buffers, handed_over(engine)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_gradients_in_buffers_are_those_of_autograd(worlds: Worlds, model: dict[str, Any]) -> None:
    ((in_buffers, by_autograd),) = worlds.run(1, both, model)
    assert in_buffers.keys() == by_autograd.keys()
    for name, gradient in by_autograd.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(in_buffers[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [1, 5, 37, 200])
def test_an_affine_map_and_its_gradients_are_torchs(rows: int) -> None:
    """Also of numbers of rows that are rounded up, and of weights as large as those that MKL multiplies by columns."""
    draw = torch.Generator().manual_seed(rows)
    x, grad = torch.randn(2, rows, 520, generator=draw), torch.randn(2, rows, 510, generator=draw)
    weight, bias = torch.randn(510, 520, generator=draw), torch.randn(510, generator=draw)

    def with_gradients(function: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        result = function(*leaves)
        result.backward(grad)
        return [result.detach(), *(leaf.grad for leaf in leaves)]

    expected = with_gradients(torch.nn.functional.linear)
    for ours, theirs in zip(with_gradients(affine), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(affine(x, weight, bias), expected[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(affine(x[:1], weight, None), expected[0][:1] - bias, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("library")
def test_vocabulary_gradient_is_added_to_what_the_buffer_holds() -> None:
    weight = torch.nn.Parameter(torch.randn(16, 4))
    hidden, targets = torch.randn(6, 4), torch.randint(16, (6,))
    shard = VocabShard.of(16, 0, 1, None)
    vocab_stats(hidden, weight, targets, shard).logprobs.sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.ones(16, 4)  # type: ignore[attr-defined]
    with assumed(CPU):
        vocab_stats(hidden, weight, targets, shard).logprobs.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, expected + 1.0)  # type: ignore[attr-defined]


def test_bfloat16_gradients_go_through_autograd_into_float32_buffers(worlds: Worlds) -> None:
    def norms() -> list[float]:
        engine = small_engine({}, GPT2, precision="bf16")
        engine.train_step(batches(engine, step=0), cross_entropy, count_targets)
        return [float(parameter.main_grad.norm()) for _, parameter in engine.parameters()]

    (found,) = worlds.run(1, norms)
    assert all(norm > 0 for norm in found)
