"""The preference losses: anchors that need no oracle, stability, and options that are refused."""

import math

import pytest
import torch
from torch import Tensor

import megarl.algorithms as a
from megarl.errors import ConfigError
from tests.refusals import refused

LN2 = math.log(2)


def pairs() -> tuple[Tensor, Tensor]:
    return torch.tensor([-1.0, -5.0]), torch.tensor([-3.0, -2.0])


@pytest.mark.parametrize(
    ("kind", "smoothing", "want"),
    [
        ("sigmoid", 0.0, LN2),
        ("sigmoid", 0.2, LN2),
        ("robust", 0.2, LN2),  # (0.8 - 0.2) ln 2 / (1 - 0.4)
        ("hinge", 0.0, 1.0),
        ("ipo", 0.0, 25.0),  # (1 / (2*0.1))^2
        ("nca_pair", 0.0, 2 * LN2),
        ("sppo_hard", 0.0, 50.0),
        ("apo_zero", 0.0, 1.0),
        ("apo_down", 0.0, 1.0),
    ],
)
def test_a_policy_equal_to_its_reference_has_a_known_loss(kind: str, smoothing: float, want: float) -> None:
    chosen, rejected = pairs()
    losses = a.dpo_loss(chosen, rejected, chosen, rejected, 0.1, kind, smoothing)
    torch.testing.assert_close(losses, torch.full((2,), want))


@pytest.mark.parametrize("kind", a.DPO_KINDS)
def test_every_dpo_kind_has_finite_losses_and_gradients_at_large_gaps(kind: str) -> None:
    chosen = torch.tensor([-500.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, -500.0], requires_grad=True)
    zero = torch.zeros(2)
    losses = a.dpo_loss(chosen, rejected, zero, zero, 1.0, kind, 0.01 if kind == "exo_pair" else 0.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_cpo_is_dpo_without_a_reference(kind: str) -> None:
    chosen, rejected = pairs()
    none = torch.zeros(2)
    want = a.dpo_loss(chosen, rejected, none, none, 0.3, kind)
    torch.testing.assert_close(a.cpo_loss(chosen, rejected, 0.3, kind), want)


def test_simpo_is_ln_two_when_the_lead_is_the_one_asked_for() -> None:
    # 2 * (-1 - -3) = 4
    losses = a.simpo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=2.0, gamma=4.0)
    assert losses.item() == pytest.approx(LN2)


def test_orpo_by_hand() -> None:
    # Odds 0.8/0.2 = 4 and 0.5/0.5 = 1: sigmoid(log 4) = 0.8
    losses = a.orpo_odds_ratio_loss(torch.tensor([0.8]).log(), torch.tensor([0.5]).log(), beta=0.5)
    assert losses.item() == pytest.approx(0.5 * math.log(0.8))


@pytest.mark.parametrize("certain", [0.0, -1e-12, -1e-4, -200.0])
def test_orpo_is_finite_for_certain_and_impossible_responses(certain: float) -> None:
    chosen = torch.tensor([certain, -1.0], requires_grad=True)
    rejected = torch.tensor([-1.0, certain], requires_grad=True)
    losses = a.orpo_odds_ratio_loss(chosen, rejected, beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_orpo_keeps_its_digits_near_certainty() -> None:
    # p = 1 - 1e-4: log odds = log(p / 1e-4), where 1 - exp(log p) in float32 has three digits left.
    logprob = math.log1p(-1e-4)
    loss = a.orpo_odds_ratio_loss(torch.tensor([-1.0]), torch.tensor([logprob]), beta=1.0).item()
    odds_ratio = (math.exp(-1) / (1 - math.exp(-1))) / ((1 - 1e-4) / 1e-4)
    assert loss == pytest.approx(math.log(odds_ratio / (1 + odds_ratio)), rel=1e-6)


def test_kto_by_hand_and_its_kl_is_a_constant() -> None:
    policy_kl = torch.tensor([1.0, 3.0], requires_grad=True)
    chosen = torch.tensor([2.0], requires_grad=True)
    losses = a.kto_loss(
        policy_chosen=chosen,
        policy_rejected=torch.tensor([2.0 - math.log(3)]),
        policy_kl=policy_kl,
        ref_chosen=torch.zeros(1),
        ref_rejected=torch.zeros(1),
        ref_kl=torch.zeros(2),
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=4.0,
    )
    losses.sum().backward()
    # KL 2. Desirable: 2*(1 - sigmoid(0)) = 1. Undesirable: 4*(1 - sigmoid(ln 3)) = 4/4.
    torch.testing.assert_close(losses.detach(), torch.tensor([1.0, 1.0]))
    assert policy_kl.grad is None
    assert chosen.grad.item() == pytest.approx(-0.5)


def test_kto_of_nothing_but_padding_is_empty_and_finite() -> None:
    none = torch.zeros(0)
    assert a.kto_loss(none, none, none, none, none, none, beta=0.1).shape == (0,)
    one = torch.ones(1)
    assert a.kto_loss(one, none, none, one, none, none, beta=0.1).item() == 0.5


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    # Leads of 0 and 2 - 0 - 2 = 0
    loss = a.bradley_terry_loss(chosen, rejected, margin=torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx(LN2)


def test_bradley_terry_over_cut_and_filled_batches_is_the_same() -> None:
    chosen, rejected = torch.randn(3), torch.randn(3)
    whole = a.bradley_terry_loss(chosen, rejected)
    filled = torch.cat([chosen[2:], torch.tensor([math.nan])]).requires_grad_()
    first = a.bradley_terry_loss(chosen[:2], rejected[:2], denominator=3)
    second = a.bradley_terry_loss(
        filled, torch.cat([rejected[2:], torch.zeros(1)]), mask=torch.tensor([1, 0]), denominator=3
    )
    second.backward()
    torch.testing.assert_close(first + second.detach(), whole)
    assert filled.grad[1] == 0
    assert filled.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [("hinge", 0.1), ("ipo", 0.1), ("exo_pair", 0.0), ("robust", 0.5), ("sigmoid", -0.1), ("sigmoid", 1.0)],
)
def test_a_label_smoothing_without_meaning_is_refused(kind: str, smoothing: float) -> None:
    with refused(ConfigError, key="label_smoothing", value=smoothing):
        a.dpo_loss(*pairs(), *pairs(), 0.1, kind, smoothing)


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with refused(ConfigError, key="kind", value="dpo", offers={"kind": list(a.DPO_KINDS)}):
        a.dpo_loss(*pairs(), *pairs(), 0.1, kind="dpo")
    with refused(ConfigError, key="kind", value="sppo_hard", offers={"kind": list(a.CPO_KINDS)}):
        a.cpo_loss(*pairs(), 0.1, kind="sppo_hard")
