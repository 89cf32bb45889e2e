"""KL estimates and the two ways to set their coefficient."""

import math

import pytest
import torch
from torch import Tensor

import megarl.algorithms as a
from megarl.errors import ConfigError, NumericsError
from tests.refusals import refused


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("k1", [2.0, -1.0, 0.0]),
        ("k2", [2.0, 0.5, 0.0]),
        ("k3", [math.exp(-2) - 1 + 2, math.e - 1 - 1, 0.0]),
        ("abs", [2.0, 1.0, 0.0]),
    ],
)
def test_each_estimate_by_hand(kind: str, want: list[float]) -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -3.0, -2.0]]), torch.tensor([[-3.0, -2.0, -2.0]])
    torch.testing.assert_close(a.kl_estimate(logprobs, ref_logprobs, kind), torch.tensor([want]))


@pytest.mark.parametrize("kind", a.KL_KINDS)
def test_equal_models_have_a_kl_of_exactly_zero(kind: str) -> None:
    logprobs = torch.randn(2, 5)
    assert (a.kl_estimate(logprobs, logprobs.clone(), kind) == 0).all()


def test_k3_keeps_its_digits_when_the_models_are_close() -> None:
    # k3 = d^2/2 - d^3/6 + ..., where exp(-d) - 1 + d in float32 is off by percents.
    gap = 1e-3
    got = a.kl_estimate(torch.tensor([gap]), torch.tensor([0.0]), "k3").item()
    assert got == pytest.approx(gap**2 / 2 - gap**3 / 6, rel=1e-3)


def test_an_unknown_estimate_is_refused_with_those_there_are() -> None:
    with refused(ConfigError, key="kind", value="k4", offers={"kind": ["k1", "k2", "k3", "abs"]}):
        a.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), kind="k4")


def test_a_fixed_coefficient_does_not_move() -> None:
    controller = a.FixedKL(coef=0.05)
    controller.update(kl=100.0, n=1000)
    assert controller.value == 0.05


def test_an_adaptive_coefficient_moves_by_hand() -> None:
    controller = a.AdaptiveKL(init=0.1, target=6, horizon=100)
    # twice the target: the error of 1 counts as 0.2, and 10 of 100 samples make it 0.02
    controller.update(kl=12, n=10)
    assert controller.value == pytest.approx(0.1 * 1.02)
    # a tenth above the target is within the bounds: 0.1 * 50/100
    controller.update(kl=6.6, n=50)
    assert controller.value == pytest.approx(0.1 * 1.02 * 1.05)
    # no divergence at all: -0.2 * 10/100
    controller.update(kl=torch.tensor(0.0), n=10)
    assert controller.value == pytest.approx(0.1 * 1.02 * 1.05 * 0.98)


def test_a_restored_controller_goes_on_as_the_first_would() -> None:
    first = a.AdaptiveKL(init=0.1, target=6, horizon=100)
    first.update(kl=9, n=10)
    second = a.AdaptiveKL(init=0.1, target=6, horizon=100)
    second.load_state_dict(first.state_dict())
    first.update(kl=2, n=10)
    second.update(kl=2, n=10)
    assert first.value == second.value != 0.1


def test_a_nan_kl_is_refused_and_leaves_the_coefficient_alone() -> None:
    controller = a.AdaptiveKL(init=0.1, target=6, horizon=100)
    with refused(NumericsError, key="kl", names=("nan",)):
        controller.update(kl=math.nan, n=10)
    assert controller.value == 0.1


def test_a_horizon_that_would_turn_the_coefficient_negative_is_refused() -> None:
    controller = a.AdaptiveKL(init=0.1, target=6, horizon=10)
    with refused(ConfigError, key="horizon", value=10, names=("20",)):
        controller.update(kl=0, n=100)
    assert controller.value == 0.1


@pytest.mark.parametrize("wrong", [{"target": 0.0}, {"horizon": 0}, {"init": -0.1}])
def test_numbers_that_cannot_steer_are_refused(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with refused(ConfigError, key=key, value=value):
        a.AdaptiveKL(**{"init": 0.1, "target": 6.0, "horizon": 100, **wrong})


def expected_gradient(kind: str, moved: bool) -> tuple[Tensor, Tensor]:
    """The mean gradient of a KL loss over every token that the old policy may sample, and the gradient of the KL."""
    torch.manual_seed(3)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    old = (logits.detach() + (0.5 * torch.randn(6, dtype=torch.float64) if moved else 0)).log_softmax(0)
    logprobs = logits.log_softmax(0)
    sampled = (old.exp() * a.kl_loss(logprobs, reference, old, kind)).sum()
    (ours,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    return ours, exact


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["k1_unbiased", "k3_unbiased"])
def test_unbiased_kinds_have_the_gradient_of_the_kl(kind: str, moved: bool) -> None:
    ours, exact = expected_gradient(kind, moved)
    torch.testing.assert_close(ours, exact)


def test_gradients_of_k1_vanish_of_k2_are_exact_of_k3_are_not() -> None:
    assert float(expected_gradient("k1", moved=False)[0].abs().max()) < 1e-12
    torch.testing.assert_close(*expected_gradient("k2", moved=False))
    ours, exact = expected_gradient("k3", moved=False)
    assert float((ours - exact).abs().max()) > 0.05


@pytest.mark.parametrize("kind", a.KL_LOSS_KINDS)
def test_a_kl_loss_has_the_value_of_its_kind(kind: str) -> None:
    logprobs, reference, old = torch.randn(3, 2, 4)
    plain = a.kl_estimate(logprobs, reference, kind.removesuffix("_unbiased"))
    weight = (logprobs - old).exp() if kind.endswith("_unbiased") else 1.0
    torch.testing.assert_close(a.kl_loss(logprobs, reference, old, kind), weight * plain)
