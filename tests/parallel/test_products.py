"""Products by either library are the product, whatever the shapes and strides."""

import pytest
import torch
from torch import Tensor

from megarl.parallel import products
from megarl.parallel.products import add_product, linear

SHAPES = [(1, 8, 8), (7, 24, 16), (0, 8, 4), (5, 8, 0), (33, 1, 40), (130, 96, 48)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("rows", "out", "inner"), SHAPES)
def test_linear_is_the_product_for_any_strides(rows: int, out: int, inner: int) -> None:
    weight, bias = normal(out, inner), normal(out)
    for x in (normal(rows, inner), normal(inner, rows).t(), normal(rows, 2 * inner)[:, ::2]):
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
        turned = weight.t().contiguous().t()
        every_second = bias.repeat_interleave(2)[::2]
        memory = torch.empty(rows, out)
        for result in (linear(x, turned, every_second), linear(x, weight, bias, out=memory)):
            torch.testing.assert_close(result.double(), expected + bias.double(), rtol=1e-5, atol=1e-5)
    stacked = linear(normal(3, rows, inner), weight, bias)
    assert stacked.shape == (3, rows, out)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("block", [64, 2**18])
@pytest.mark.parametrize("inner", [30, 90])
def test_a_product_is_added_to_what_is_there(inner: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or many, standing or lying down."""
    monkeypatch.setattr(products, "BLOCK", block)
    whole = normal(200, 40)
    total, a, b = whole[3:], normal(inner, 197).t(), normal(inner, 40)
    expected = whole.double()
    expected[3:] += a.double() @ b.double()
    add_product(total, a, b)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_a_sum_over_nothing_adds_nothing() -> None:
    """A replica without a token to learn from."""
    total = normal(4, 3)
    add_product(total, torch.empty(0, 4).t(), torch.empty(0, 3))
    assert torch.equal(total, normal(4, 3))


def test_a_narrow_product_is_added_to_a_wide_total() -> None:
    total, a, b = torch.full((4, 3), 0.5), normal(4, 5).bfloat16(), normal(5, 3).bfloat16()
    add_product(total, a, b)
    torch.testing.assert_close(total, 0.5 + (a @ b).float())


@pytest.mark.usefixtures("library")
def test_other_dtypes_keep_their_precision() -> None:
    x, weight = normal(5, 16).double(), normal(9, 16).double()
    torch.testing.assert_close(linear(x, weight), x @ weight.t(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "", False),
    ],
)
def test_the_library_follows_from_the_processor(
    processor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN for dense tensors")
    monkeypatch.setattr(products, "_processor", lambda: f"vendor_id\t: {processor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "7")
    assert products.onednn_is_faster.__wrapped__() is expected
