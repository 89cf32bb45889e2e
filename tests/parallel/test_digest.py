"""Checksums of tensors: exact, alike for a tensor and for its slices, and blind to padding alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarl.parallel.digest import MODULUS, digest
from megarl.parallel.initialise import local_slice
from tests.parallel.engines import small_engine
from tests.worlds import Worlds

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def values(kind: torch.dtype, *shape: int) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return drawn.to(kind) if kind.is_floating_point else (drawn * 20).abs().to(kind)


def split(tensor: Tensor, dim: int, stride: int) -> Tensor:
    """A tensor with Megatron's marks of one that is split."""
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    tensor.partition_dim, tensor.partition_stride = dim, stride  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "dim", "stride"), [((8, 6), 0, 1), ((8, 6), 0, 2), ((3, 8), 1, 1), ((2, 4, 3), 1, 2)]
)
def test_the_sum_over_slices_is_that_of_the_whole(
    kind: torch.dtype, shape: tuple[int, ...], dim: int, stride: int
) -> None:
    whole = split(values(kind, *shape), dim, stride)
    slices = [split(local_slice(whole, whole, rank, 2), dim, stride) for rank in range(2)]
    assert sum(digest(part, rank, 2) for rank, part in enumerate(slices)) % MODULUS == digest(whole)
    assert sum(digest(part, 1 - rank, 2) for rank, part in enumerate(slices)) % MODULUS != digest(whole), "misplaced"


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_of_one_value_changes_it(kind: torch.dtype) -> None:
    tensor = values(kind, 5, 7)
    before = digest(tensor)
    bits = tensor.view(BITS[tensor.element_size()])
    for bit in (0, 3, 8 * tensor.element_size() - 2):
        bits[2, 3].bitwise_xor_(1 << bit)
        assert digest(tensor) != before
        bits[2, 3].bitwise_xor_(1 << bit)
    assert digest(tensor) == before


def test_values_that_change_places_change_it() -> None:
    tensor = values(torch.float32, 6)
    assert digest(tensor.flip(0)) != digest(tensor)


def test_zeros_add_nothing() -> None:
    tensor = values(torch.bfloat16, 5, 7)
    padding = torch.zeros(3, 7, dtype=torch.bfloat16)
    padding[0] = -0.0
    assert digest(torch.cat([tensor, padding])) == digest(tensor)
    assert digest(padding) == digest(torch.zeros(())) == digest(torch.zeros(0, 4)) == 0


def test_a_large_tensor_is_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = values(torch.float32, 9, 5)
    whole = digest(tensor.t())  # not contiguous
    monkeypatch.setattr("megarl.parallel.digest._MOST_CPU", 12)
    assert digest(tensor.t()) == whole == digest(tensor.t().contiguous())


def test_a_checksum_is_the_same_in_every_version() -> None:
    """Names of stored references are made with the same sum."""
    assert digest(torch.tensor([[1.0, -2.0], [0.5, 0.0]])) == 8416314700286998587


def in_bf16(layout: dict[str, int]) -> tuple[dict[str, int], dict[str, int], dict[str, list[int]], dict[str, int]]:
    """Checksums of all, of some, of all copies, and of all after rank 0 flipped the lowest bit of one value."""
    engine = small_engine(layout, {"tie_embeddings": True}, train=False, precision="bf16")
    found = engine.digests(), engine.digests(lambda name: "norm" in name), engine.digests_of_copies()
    if engine.grid.rank == 0:
        dict(engine.parameters())["decoder.layers.0.mlp.linear_fc1.weight"].data.view(torch.int16)[1, 2] ^= 1
    return *found, engine.digests()


def test_every_layout_has_the_same_checksums_in_bf16(worlds: Worlds) -> None:
    wanted, norms, _, changed = worlds.run(1, in_bf16, {})[0]
    assert set(norms) == {name for name in wanted if "norm" in name}
    assert {name for name in wanted if wanted[name] != changed[name]} == {"decoder.layers.0.mlp.linear_fc1.weight"}
    for layout, copies_of_norms, copies_of_embedding in (({"tp": 2}, 2, 1), ({"pp": 2}, 1, 2), ({}, 2, 2)):
        for found, some, copies, with_flip in worlds.run(2, in_bf16, layout):
            assert found == wanted
            assert some == norms
            assert with_flip == changed
            assert copies["decoder.layers.0.input_layernorm.weight"] == copies_of_norms * [
                wanted["decoder.layers.0.input_layernorm.weight"]
            ]
            assert copies["embedding.word_embeddings.weight"] == copies_of_embedding * [
                wanted["embedding.word_embeddings.weight"]
            ]
