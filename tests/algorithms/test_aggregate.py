"""Aggregation: what each kind counts, and that cutting a batch does not change the number."""

import math

import pytest
import torch

import megarl.algorithms as a
from megarl.errors import ConfigError
from tests.refusals import refused

# Rows of 2 tokens, 1 token and none. Junk where masked out.
LOSS = torch.tensor([[1.0, 3.0, math.inf], [math.nan, 5.0, math.nan], [7.0, math.nan, -math.inf]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "norm", "want"),
    [
        ("token_mean", None, 9 / 3),  # 1 + 3 + 5 over three tokens
        ("seq_mean_token_mean", None, (2 + 5) / 2),  # row means 2 and 5; the empty row is no row
        ("seq_mean_token_sum", None, (4 + 5) / 2),
        ("seq_mean_token_sum_norm", None, (4 + 5) / 2 / 3),  # padded width 3
        ("seq_mean_token_sum_norm", 10, (4 + 5) / 2 / 10),
    ],
)
def test_each_kind_counts_what_its_name_says(how: str, norm: float | None, want: float) -> None:
    assert a.aggregate(LOSS, MASK, how, norm=norm).item() == pytest.approx(want)


@pytest.mark.parametrize(("how", "want"), [("token_mean", 3), ("seq_mean_token_sum", 2)])
def test_the_count_to_share_between_ranks_is_tokens_or_non_empty_rows(how: str, want: int) -> None:
    assert a.aggregation_count(MASK, how).item() == want


@pytest.mark.parametrize("how", a.AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 0, torch.tensor(0), torch.tensor(0.0)])
def test_an_empty_batch_costs_nothing_and_pulls_nowhere(how: str, denominator: torch.Tensor | float | None) -> None:
    loss = torch.full((2, 3), math.nan, requires_grad=True)
    value = a.aggregate(loss, torch.zeros(2, 3), how, denominator=denominator)
    value.backward()
    assert value.item() == 0
    assert torch.equal(loss.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("how", a.AGGREGATIONS)
@pytest.mark.parametrize("cuts", [[6], [1, 1, 1, 1, 1, 1], [4, 2], [2, 3, 1]])
def test_microbatches_add_up_to_the_whole_batch_and_its_gradient(how: str, cuts: list[int]) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(6, 5) < 0.6).double()
    mask[2] = 0  # a filling row, which in cuts of one is a microbatch without any token
    whole = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    count = a.aggregation_count(mask, how)
    want = a.aggregate(whole, mask, how, norm=5)
    want.backward()

    parts = whole.detach().clone().requires_grad_()
    pieces = zip(parts.split(cuts), mask.split(cuts), strict=True)
    got = sum(a.aggregate(loss, part, how, norm=5, denominator=count) for loss, part in pieces)
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_the_mask_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    assert a.aggregate(LOSS, MASK.to(dtype), "token_mean").item() == 3


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with refused(ConfigError, key="aggregation", value="mean", offers={"aggregation": list(a.AGGREGATIONS)}):
        a.aggregate(LOSS, MASK, "mean")


def test_a_norm_of_zero_is_refused() -> None:
    with refused(ConfigError, key="norm", value=0):
        a.aggregate(LOSS, MASK, "seq_mean_token_sum_norm", norm=0)


def test_masking_stops_junk_before_a_function_that_is_not_finite_there() -> None:
    x = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    a.mask_out(x, torch.tensor([1, 0, 0])).exp().sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([math.e, 0.0, 0.0]))
