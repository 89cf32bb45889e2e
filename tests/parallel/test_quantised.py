"""A frozen weight in 4 or 8 bits has the numbers of the published format in every layout, and takes little memory."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarl.errors import NumericsError
from megarl.parallel import quantised
from megarl.parallel.initialise import local_slice
from megarl.parallel.quantised import BLOCK, NF4, QuantisedWeight
from tests.parallel.nf4_golden import GOLDEN, matrix

WIDTHS = (144, 72, 100, 64, 256)
CUTS = [(0, 1), (0, 2), (1, 1)]
"""partition_dim and stride of a column-parallel layer, of gate and up, and of a row-parallel layer."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / 50


def quantise(whole: Tensor, bits: int = 4, dtype: torch.dtype = torch.float32, **cut: Any) -> QuantisedWeight:
    made = QuantisedWeight(*whole.shape, bits=bits, dtype=dtype, device="cpu", **cut)
    made.fill(whole)
    return made


def unpacked(weight: QuantisedWeight) -> Tensor:
    return torch.stack([weight.codes >> 4, weight.codes & 15], dim=2).flatten(1)[:, : weight.columns]


def absmax_of(values: Tensor) -> Tensor:
    """Of blocks of whole rows, which 0s fill up."""
    return nn.functional.pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).abs().amax(2)


def test_numbers_are_those_of_bitsandbytes() -> None:
    """nf4_golden.json is what bitsandbytes 0.50.2 made of the matrix on a CPU (tests/parallel/nf4_golden.py).

    Its CPU kernel rounds a share of absmax before it looks up the code, so a few codes are not the nearest.
    """
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    whole = matrix()
    ours = quantise(whole)
    assert bytes(ours.codes.flatten().tolist()).hex() == golden["codes"]
    scales = ours.scales.view(torch.float32)
    torch.testing.assert_close(scales, torch.tensor([*golden["scales"], golden["offset"]]), rtol=1e-6, atol=0)

    theirs = torch.tensor(list(bytes.fromhex(golden["absmax_codes"])))
    same = ours.absmax.flatten().int() == theirs
    assert int((~same).sum()) <= 4
    absmax, their_absmax = absmax_of(ours.dequantised()).flatten(), torch.tensor(golden["absmax"])
    torch.testing.assert_close(absmax[same], their_absmax[same], rtol=1e-6, atol=0)
    exact = absmax_of(whole).flatten()
    assert ((absmax - exact).abs() < (their_absmax - exact).abs())[~same].all()
    torch.testing.assert_close(ours.dequantised()[0], torch.tensor(golden["first_row"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_an_installed_bitsandbytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    whole = normal(768, 768).to(dtype)
    codes, state = functional.quantize_4bit(whole, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = quantise(whole, dtype=dtype)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    same = ours.absmax.flatten() == state.absmax
    assert same.float().mean() > 0.99
    theirs = functional.dequantize_4bit(codes, state).view(-1, BLOCK)
    torch.testing.assert_close(ours.dequantised().view(-1, BLOCK)[same], theirs[same])


def test_four_bits_are_the_nearest_levels_of_short_and_full_blocks() -> None:
    whole = normal(6, 100)
    shares = whole / absmax_of(whole).repeat_interleave(BLOCK, dim=1)[:, :100]
    nearest = (shares[:, :, None] - torch.tensor(NF4)).abs().argmin(2)
    assert torch.equal(unpacked(quantise(whole)).long(), nearest)
    odd = quantise(whole[:, :99])
    assert odd.codes.shape == (6, 50)
    assert odd.dequantised().shape == (6, 99)


def test_eight_bits_are_equal_steps_of_the_absmax() -> None:
    whole = normal(40, 200)
    weight = quantise(whole, bits=8)
    absmax = absmax_of(whole).repeat_interleave(BLOCK, dim=1)[:, :200]
    assert torch.equal(weight.codes.float(), (whole / absmax * 127).round())
    assert ((weight.dequantised() - whole).norm() / whole.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dim", "stride"), CUTS)
def test_slices_of_every_layout_have_the_bits_of_the_whole(
    dim: int, stride: int, width: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also slices that start within a block (144 / 4 = 36) and of an odd number of values (100 / 4 = 25)."""
    whole = normal(104, width)
    expected = quantise(whole, bits, dtype).dequantised()
    monkeypatch.setattr(quantised, "CPU_CHUNK", 7 * width)  # chunks that do not divide the rows
    parameter = nn.Parameter(torch.empty(0))
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride  # type: ignore[attr-defined]
    for tp in (1, 2, 4):
        for rank in range(tp):
            part = quantise(whole, bits, dtype, partition_dim=dim, stride=stride, rank=rank, tp=tp)
            assert torch.equal(part.dequantised(), local_slice(expected, parameter, rank, tp))


def test_a_weight_that_is_not_cut_is_whole_on_every_rank() -> None:
    whole = normal(8, 72)
    part = quantise(whole, partition_dim=None, rank=1, tp=2)
    assert torch.equal(part.dequantised(), quantise(whole).dequantised())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [100, 128])
def test_product_and_its_gradient_are_those_of_the_dequantised_weight(
    width: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "CPU_CHUNK", 7 * width)
    weight = quantise(normal(40, 2 * width), bits, dtype, partition_dim=1, rank=1, tp=2)
    dense = weight.dequantised().float()
    x = normal(3, 5, width).to(dtype).requires_grad_()
    gradient = normal(3, 5, 40).to(dtype)
    product = weight.product(x)
    product.backward(gradient)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-4}
    assert product.dtype == dtype
    assert x.grad is not None
    torch.testing.assert_close(product.float(), x.detach().float() @ dense.T, **tolerance)
    torch.testing.assert_close(x.grad.float(), gradient.float() @ dense, **tolerance)
    assert weight.product(x[:0].detach()).shape == (0, 5, 40)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.55), (8, 1.1)])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 896)])
def test_bytes_a_value_are_few(shape: tuple[int, int], bits: int, most: float) -> None:
    """Of the whole and of slices that start within a block (896 / 4 = 224), as storages have them."""
    for tp in (1, 4):
        part = quantise(normal(*shape), bits, partition_dim=1, rank=tp - 1, tp=tp)
        held = sum(buffer.untyped_storage().nbytes() for buffer in part.buffers())
        assert held == part.bytes
        assert held <= most * shape[0] * shape[1] / tp


class LargestTensor(TorchDispatchMode):
    """Measure the storage of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_never_holds_the_dequantised_weight(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "CPU_CHUNK", 2**14)
    weight = quantise(normal(512, 512), bits)
    x = normal(2, 512).requires_grad_()
    with LargestTensor() as largest:
        weight.product(x).sum().backward()
    assert largest.bytes <= max(weight.codes.nbytes, 2**14 * 4)
    kept = weight.product(x).grad_fn
    assert kept is not None
    assert not getattr(kept, "saved_tensors", ())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_takes_little_memory_beside_the_matrix(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "CPU_CHUNK", 2**14)
    whole = normal(512, 512).bfloat16()
    with LargestTensor() as largest:
        quantise(whole, bits)
    assert largest.bytes <= whole.nbytes


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(wrong: float) -> None:
    whole = normal(8, 100)
    whole[6, 99] = wrong
    with pytest.raises(NumericsError) as caught:
        quantise(whole, partition_dim=0, rank=0, tp=2)
    assert caught.value.key == "weight"
    assert caught.value.where == "row 6"


def test_strides_of_the_whole_do_not_matter() -> None:
    whole = normal(128, 72)
    turned = whole.t().contiguous().t()
    assert torch.equal(quantise(turned).dequantised(), quantise(whole).dequantised())
    assert torch.equal(quantise(turned.t()).dequantised(), quantise(whole.t().contiguous()).dequantised())


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    whole = normal(300, 72)
    whole[7] = 0
    assert not quantise(whole, bits).dequantised()[7].any()
    assert not quantise(torch.zeros(3, 72), bits).dequantised().any()


def test_a_cast_of_the_model_changes_nothing() -> None:
    """Megatron casts a whole model to bf16, its buffers of floats too."""
    model = nn.Sequential(quantise(normal(300, 72)))
    before = model[0].dequantised()
    model.bfloat16()
    assert torch.equal(model[0].dequantised(), before)
    assert not model.state_dict()
    assert not list(model.parameters())


def test_a_plan_allocates_without_values() -> None:
    meta = QuantisedWeight(768, 768, bits=4, dtype=torch.bfloat16, device="meta", partition_dim=0, tp=2)
    assert meta.bytes == quantise(normal(768, 768), partition_dim=0, tp=2).bytes
    assert meta.product(torch.empty(5, 768, dtype=torch.bfloat16, device="meta")).shape == (5, 384)


def test_the_offset_has_the_same_bits_for_any_order() -> None:
    """A float32 sum of 2^17 numbers does not, and its order depends on the number of threads."""
    absmax = normal(2**17, 1).abs()
    offset = quantised._compress(absmax)[1][-1]
    assert torch.equal(offset, quantised._compress(absmax.sort(0).values)[1][-1])
    torch.testing.assert_close(offset, absmax.double().mean().float(), rtol=1e-7, atol=0)
