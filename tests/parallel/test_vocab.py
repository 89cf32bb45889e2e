"""Statistics over a sharded vocabulary against torch.log_softmax of the whole one in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarl.parallel import vocab
from megarl.parallel.vocab import VocabShard, VocabStats, padded_vocab, token_outputs, vocab_stats
from tests.worlds import Worlds

HIDDEN = 6
# How much each statistic weighs in the scalar that is differentiated.
WEIGHTS = {"target_logits": 0.3, "lse": -0.7, "entropy": 1.1}


def problem(n: int, size: int, tp: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """hidden [n, HIDDEN], weight [padded, HIDDEN], bias [padded], targets [n]. Padding rows are large: one that entered
    a sum would show."""
    generator = torch.Generator().manual_seed(7)
    rows = padded_vocab(size, tp)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias = normal(rows, HIDDEN), normal(rows)
    weight[size:], bias[size:] = 50.0, 50.0
    targets = torch.randint(0, size, (n,), generator=generator)
    return {
        "hidden": normal(n, HIDDEN).to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "targets": targets,
        "shares": normal(3, n),
    }


def weighed(stats: VocabStats, shares: Tensor) -> Tensor:
    """A scalar in which every position's statistics have their own weight; `shares` [3, n]."""
    parts = [stats.target_logits, stats.lse, *([] if stats.entropy is None else [stats.entropy])]
    factors = list(WEIGHTS.values())
    terms = [f * (share * part).sum() for f, share, part in zip(factors, shares, parts, strict=False)]
    return torch.stack(terms).sum()


def expected(
    given: dict[str, Tensor], size: int, temperature: float, with_bias: bool, entropy: bool
) -> dict[str, Tensor]:
    """The same by torch, over the whole vocabulary: statistics and gradients."""
    leaves = {key: given[key].double().clone().requires_grad_() for key in ("hidden", "weight", "bias")}
    logits = leaves["hidden"] @ leaves["weight"][:size].T + (leaves["bias"][:size] if with_bias else 0.0)
    logits = logits / temperature
    log_softmax = torch.log_softmax(logits, dim=-1)
    stats = VocabStats(
        logits.gather(1, given["targets"][:, None])[:, 0],
        torch.logsumexp(logits, dim=-1),
        -(log_softmax.exp() * log_softmax).sum(-1) if entropy else None,
    )
    weighed(stats, given["shares"]).backward()
    return {
        "logprobs": log_softmax.gather(1, given["targets"][:, None])[:, 0].detach(),
        "lse": stats.lse.detach(),
        **({"entropy": stats.entropy.detach()} if stats.entropy is not None else {}),
        **{f"grad_{key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None},
    }


def ours(
    given: dict[str, Tensor], size: int, temperature: float, with_bias: bool, entropy: bool, chunk: int = 16
) -> dict[str, Tensor]:
    """This rank's statistics, the whole hidden gradient, and gathered weight and bias gradients."""
    tp, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    group = dist.group.WORLD if tp > 1 else None
    shard = VocabShard.of(size, rank, tp, group)
    rows = given["weight"].shape[0] // tp
    mine = slice(rank * rows, (rank + 1) * rows)
    hidden = given["hidden"].clone().requires_grad_()
    weight = given["weight"][mine].clone().requires_grad_()
    bias = given["bias"][mine].clone().requires_grad_()
    whole_budget = vocab.CHUNK_ELEMENTS_CPU
    vocab.CHUNK_ELEMENTS_CPU = chunk
    try:
        stats = vocab_stats(
            hidden,
            weight,
            given["targets"],
            shard,
            bias=bias if with_bias else None,
            temperature=temperature,
            entropy=entropy,
        )
        weighed(stats, given["shares"]).backward()
    finally:
        vocab.CHUNK_ELEMENTS_CPU = whole_budget
    grads = {"grad_hidden": hidden.grad, "grad_weight": weight.grad, **({"grad_bias": bias.grad} if with_bias else {})}
    if group is not None:
        dist.all_reduce(grads["grad_hidden"], group=group)
        for key in sorted(grads.keys() - {"grad_hidden"}):  # the same order on every rank
            parts = [torch.empty_like(grads[key]) for _ in range(tp)]
            dist.all_gather(parts, grads[key], group=group)
            grads[key] = torch.cat(parts)
    return {
        "logprobs": stats.logprobs.detach(),
        "lse": stats.lse.detach(),
        **({} if stats.entropy is None else {"entropy": stats.entropy.detach()}),
        **grads,
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key].double(), value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_and_gradients_are_those_of_log_softmax(with_bias: bool, entropy: bool, temperature: float) -> None:
    given = problem(n=23, size=11, tp=1)
    assert_same(ours(given, 11, temperature, with_bias, entropy), expected(given, 11, temperature, with_bias, entropy))


@pytest.mark.parametrize(("size", "tp"), [(11, 2), (11, 4), (5, 4)])
def test_shards_together_give_the_whole_vocabulary(worlds: Worlds, size: int, tp: int) -> None:
    given = problem(n=9, size=size, tp=tp)
    wanted = expected(given, size, 0.7, True, True)
    for found in worlds.run(tp, ours, given, size, 0.7, True, True):
        assert_same(found, wanted)


def test_a_toy_vocabulary_leaves_a_shard_empty() -> None:
    """What the case (5, 4) above rests on: five tokens padded to eight rows, two a rank."""
    shards = [VocabShard.of(5, rank, 4, None) for rank in range(4)]
    assert [(shard.start, shard.valid) for shard in shards] == [(0, 2), (2, 2), (4, 1), (6, 0)]


@pytest.mark.parametrize(
    ("size", "tp", "rows"), [(101, 1, 104), (101, 2, 104), (5, 4, 8), (101, 3, 120), (1024, 4, 1024), (50257, 8, 50304)]
)
def test_vocabularies_are_padded_for_resharding(size: int, tp: int, rows: int) -> None:
    assert padded_vocab(size, tp) == rows


def test_no_positions_give_no_statistics_and_zero_gradients() -> None:
    found = ours(problem(n=0, size=11, tp=1), 11, 0.7, True, True)
    assert found["logprobs"].shape == found["entropy"].shape == (0,)
    assert not found["grad_weight"].any()
    assert not found["grad_bias"].any()


def test_no_positions_are_agreed_on_by_all_shards(worlds: Worlds) -> None:
    for found in worlds.run(2, ours, problem(n=0, size=11, tp=2), 11, 1.0, False, True):
        assert found["logprobs"].shape == (0,)
        assert not found["grad_weight"].any()


def test_chunks_do_not_show_in_the_result() -> None:
    given = problem(n=23, size=11, tp=1)
    assert_same(ours(given, 11, 0.7, True, True, chunk=1), ours(given, 11, 0.7, True, True, chunk=10**6), 1e-13)


def test_bf16_states_give_float32_statistics_and_bf16_gradients() -> None:
    given = problem(n=23, size=11, tp=1, dtype=torch.bfloat16)
    found = ours(given, 11, 1.0, True, True)
    assert {found[key].dtype for key in ("logprobs", "lse", "entropy")} == {torch.float32}
    assert {found[key].dtype for key in ("grad_hidden", "grad_weight", "grad_bias")} == {torch.bfloat16}
    # bf16 keeps 8 bits: logits of a few units are off by a few hundredths, gradients (of size up to 10) likewise.
    assert_same(found, expected(given, 11, 1.0, True, True), tolerance=0.08)


def test_a_bf16_gradient_does_not_depend_on_the_number_of_chunks() -> None:
    """Summed in bf16, 4096 rows in chunks of one would lose what is below 1/256 of the sum."""
    given = problem(n=4096, size=11, tp=1, dtype=torch.bfloat16)
    many, one = (ours(given, 11, 1.0, True, False, chunk=size)["grad_weight"].float() for size in (1, 10**7))
    assert (many - one).abs().max() <= 0.02 * one.abs().max()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation under it gave out."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS_CPU", 2**14)
    return 2**14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_whole_batch_are_never_held(small_chunks: int, dtype: torch.dtype) -> None:
    positions, size = 512, 2048
    hidden = torch.randn(positions, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(size, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, size, (positions,))
    with LargestTensor() as seen:
        stats = vocab_stats(hidden, weight, targets, VocabShard(0, size, size, None), temperature=0.7, entropy=True)
        assert stats.entropy is not None
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert seen.numel <= max(small_chunks, weight.numel()) < positions * size // 4


def test_the_measure_of_the_largest_tensor_sees_the_plain_way() -> None:
    """The test above would mean nothing if its measure missed logits that are held."""
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(2048, 8)
    with LargestTensor() as seen:
        torch.log_softmax(hidden @ weight.T, -1).sum().backward()
    assert seen.numel == 512 * 2048


def chosen_alone(given: dict[str, Tensor], size: int, chunk: int = 2**23) -> Tensor:
    tp, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    shard = VocabShard.of(size, rank, tp, dist.group.WORLD if tp > 1 else None)
    rows = given["weight"].shape[0] // tp
    mine = slice(rank * rows, (rank + 1) * rows)
    whole_budget = vocab.CHUNK_ELEMENTS_CPU
    vocab.CHUNK_ELEMENTS_CPU = chunk
    try:
        return token_outputs(given["hidden"], given["weight"][mine], given["targets"], shard, bias=given["bias"][mine])
    finally:
        vocab.CHUNK_ELEMENTS_CPU = whole_budget


@pytest.mark.parametrize(("size", "tp"), [(11, 1), (11, 2), (5, 4)])
def test_the_output_of_one_token_needs_no_other(worlds: Worlds, size: int, tp: int) -> None:
    given = problem(n=9, size=size, tp=tp)
    wanted = (given["hidden"] @ given["weight"].T + given["bias"]).gather(1, given["targets"][:, None])[:, 0]
    for found in worlds.run(tp, chosen_alone, given, size, 7):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
