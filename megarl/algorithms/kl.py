"""Estimators of the KL divergence between policy and reference, and controllers of its coefficient."""

import math
from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithms.checks import check_choice, check_range
from megarl.errors import NumericsError

KL_KINDS = ("k1", "k2", "k3", "abs")
UNBIASED = "_unbiased"
KL_LOSS_KINDS = (*KL_KINDS, "k1" + UNBIASED, "k3" + UNBIASED)
MAX_LOG_RATIO = 20.0
MAX_PROPORTIONAL_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Return a per-token estimate of KL(policy, reference) from samples of the policy (k1 to k3: Schulman, 2020).

    With d = logprobs - ref_logprobs: k1 = d (unbiased, signed), k2 = d^2/2, k3 = exp(-d) - 1 + d (unbiased,
    never negative), abs = |d|. Nothing is clamped. The function has no mask: if masked-out positions may be arbitrary
    and a gradient is needed, apply `mask_out` to both inputs first.

    Args:
        logprobs: [batch, time], of the policy.
        ref_logprobs: [batch, time], of the reference.
        kind: one of `KL_KINDS`.

    Returns:
        [batch, time].
    """
    check_choice("kind", kind, KL_KINDS)
    gap = logprobs - ref_logprobs
    if kind == "k1":
        return gap
    if kind == "k2":
        return 0.5 * gap.square()
    if kind == "abs":
        return gap.abs()
    # expm1 keeps the digits that exp(-d) - 1 loses when the two models are close, which is the usual case.
    return torch.expm1(-gap) + gap


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, kind: str) -> Tensor:
    """Return a per-token KL(policy, reference) to minimise, from samples of the old policy.

    Plain kinds are `kl_estimate`, whose gradients are those of the formulas: that of k1 has mean 0 and pulls nowhere,
    that of k3 belongs to another divergence, and only that of k2 belongs to this KL, as long as policy and old policy
    are equal. `k1_unbiased` and `k3_unbiased` have the values ratio*k1 and ratio*k3 with
    ratio = exp(logprobs - old_logprobs), whose mean is the KL of the policy also after it has moved, and the gradient
    ratio*d*grad(logprobs), whose mean is the gradient of that KL (k3: DeepSeek-V3.2, arXiv 2512.02556).

    Args:
        logprobs: [batch, time], of the policy.
        ref_logprobs: [batch, time], of the reference.
        old_logprobs: [batch, time], of the policy that sampled.
        kind: one of `KL_LOSS_KINDS`.

    Returns:
        [batch, time].
    """
    check_choice("kind", kind, KL_LOSS_KINDS)
    if not kind.endswith(UNBIASED):
        return kl_estimate(logprobs, ref_logprobs, kind)
    present = logprobs.detach()
    ratio = (present - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    slope = ratio * (present - ref_logprobs.detach())
    value = ratio * kl_estimate(present, ref_logprobs.detach(), kind.removesuffix(UNBIASED))
    return value + slope * (logprobs - present)


class KLController(Protocol):
    """A controller of the KL coefficient: `value` is read during a phase, `update` is called once at its end."""

    value: float

    def update(self, kl: float, n: int) -> None:
        """Update the coefficient from the phase's mean KL per sequence `kl` over `n` samples."""

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""


class FixedKL:
    """A constant coefficient."""

    def __init__(self, coef: float) -> None:
        check_range("coef", coef, coef >= 0, "a KL coefficient is 0 or more")
        self.value = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Do nothing: the coefficient is constant."""

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.value = float(state["value"])


class AdaptiveKL:
    """A coefficient that steers the KL towards a target (Ziegler et al., 2019, section 2.2).

    Args:
        init: initial coefficient.
        target: target of the KL per sequence.
        horizon: number of samples over which the coefficient changes by at most a fifth of itself.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        check_range("init", init, init >= 0, "a KL coefficient is 0 or more")
        check_range("target", target, target > 0, "use a KL above 0, or a fixed coefficient")
        check_range("horizon", horizon, horizon > 0, "use a number of samples above 0")
        self.value = float(init)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, n: int) -> None:
        """Update the coefficient after a phase: value * (1 + clip(kl/target - 1, +-0.2) * n/horizon).

        Args:
            kl: mean KL per sequence of the phase.
            n: samples in the phase, over all ranks.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise NumericsError(
                f"kl={kl} cannot steer the KL coefficient: look at this phase's log-probs", key="kl", value=kl
            )
        error = min(max(kl / self.target - 1.0, -MAX_PROPORTIONAL_ERROR), MAX_PROPORTIONAL_ERROR)
        factor = 1.0 + error * n / self.horizon
        check_range(
            "horizon",
            self.horizon,
            factor > 0,
            f"{n} samples in one phase would turn the coefficient negative; make it more than {n / 5:g}",
        )
        self.value *= factor

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint; target and horizon come from the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.value = float(state["value"])
