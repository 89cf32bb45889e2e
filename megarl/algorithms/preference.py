"""Losses on preferred and rejected responses: DPO and its variants, KTO, ORPO, CPO, SimPO.

Inputs are log-probs of whole responses, [batch]. Every loss is returned per example, so that the caller divides by the
global count.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megarl.algorithms.checks import check_choice, check_range

SMOOTHED_DPO_KINDS = ("sigmoid", "robust", "exo_pair")
DPO_KINDS = (*SMOOTHED_DPO_KINDS, "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down")
CPO_KINDS = ("sigmoid", "hinge", "ipo")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., 2023, equation 7) and losses with the same inputs.

    Args:
        policy_chosen, policy_rejected: [batch], log-probs under the policy. For ipo, use means over the tokens, as is
            customary; the inputs are not averaged here.
        ref_chosen, ref_rejected: [batch], the same under the reference.
        beta: how strongly the policy is tied to the reference.
        kind: one of `DPO_KINDS`.
        label_smoothing: assumed fraction of flipped labels; for sigmoid, robust (below 0.5) and exo_pair
            (above 0).

    Returns:
        [batch].
    """
    check_choice("kind", kind, DPO_KINDS)
    _check_smoothing(kind, label_smoothing)
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    gap = chosen - rejected
    z = beta * gap
    match kind:
        case "sigmoid":
            return _smoothed_sigmoid(z, label_smoothing)
        case "robust":
            kept, flipped = 1 - label_smoothing, label_smoothing
            return (flipped * logsigmoid(-z) - kept * logsigmoid(z)) / (1 - 2 * label_smoothing)
        case "exo_pair":
            won = z.sigmoid() * (logsigmoid(z) - math.log1p(-label_smoothing))
            lost = (-z).sigmoid() * (logsigmoid(-z) - math.log(label_smoothing))
            return won + lost
        case "hinge":
            return torch.relu(1 - z)
        case "ipo":
            return (gap - 1 / (2 * beta)).square()
        case "nca_pair":
            pull_down = logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected)
            return -logsigmoid(beta * chosen) - 0.5 * pull_down
        case "sppo_hard":
            return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
        case "apo_zero":
            return (1 - (beta * chosen).sigmoid()) + (beta * rejected).sigmoid()
        case _:  # apo_down
            return (beta * chosen).sigmoid() + (1 - z.sigmoid())


def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The preference term of CPO (Xu et al., 2024, arXiv 2401.08417): DPO without a reference.

    The caller adds the NLL of the chosen response.

    Args:
        policy_chosen, policy_rejected: [batch], log-probs under the policy.
        beta: scale of the log-prob difference.
        kind: one of `CPO_KINDS`.
        label_smoothing: as in `dpo_loss`; sigmoid only.

    Returns:
        [batch].
    """
    check_choice("kind", kind, CPO_KINDS)
    none = torch.zeros_like(policy_chosen)
    return dpo_loss(policy_chosen, policy_rejected, none, none, beta, kind, label_smoothing)


def simpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO (Meng et al., 2024, arXiv 2405.14734): the chosen response should lead by `gamma`; there is no reference.

    Args:
        policy_chosen, policy_rejected: [batch], log-probs averaged over the tokens.
        beta: scale of the log-prob difference.
        gamma: the target margin, in units of beta times log-prob.
        label_smoothing: assumed fraction of flipped labels.

    Returns:
        [batch].
    """
    _check_smoothing("sigmoid", label_smoothing)
    return _smoothed_sigmoid(beta * (policy_chosen - policy_rejected) - gamma, label_smoothing)


def orpo_odds_ratio_loss(policy_chosen: Tensor, policy_rejected: Tensor, beta: float) -> Tensor:
    """The log odds ratio term of ORPO (Hong et al., 2024, arXiv 2403.07691), 0 or less: SUBTRACT its mean from the NLL.

    Args:
        policy_chosen, policy_rejected: [batch], log-probs averaged over the tokens.
        beta: weight of the term.

    Returns:
        [batch].
    """
    log_odds_ratio = _log_odds(policy_chosen) - _log_odds(policy_rejected)
    return beta * logsigmoid(log_odds_ratio)


def kto_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    policy_kl: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    ref_kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al., 2024, arXiv 2402.01306): each response separately, relative to the batch's KL.

    Args:
        policy_chosen, ref_chosen: [desirable], log-probs of the desirable responses; may be empty.
        policy_rejected, ref_rejected: [undesirable], of the undesirable ones; may be empty.
        policy_kl, ref_kl: [pairs], log-probs of mismatched prompts and responses, gathered over the global
            batch, for the KL estimate. It carries no gradient and is 0 at least.
        beta: how strongly the policy is tied to the reference.
        desirable_weight, undesirable_weight: weights that balance unequal counts.

    Returns:
        [desirable + undesirable], the desirable ones first.
    """
    gaps = (policy_kl - ref_kl).detach()
    kl = (gaps.sum() / max(gaps.numel(), 1)).clamp(min=0)
    chosen = 1 - (beta * (policy_chosen - ref_chosen - kl)).sigmoid()
    rejected = 1 - (beta * (kl - (policy_rejected - ref_rejected))).sigmoid()
    return torch.cat([desirable_weight * chosen, undesirable_weight * rejected])


def _smoothed_sigmoid(z: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(z), mixed with the loss of the flipped label."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def _log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p <= 0."""
    # A log-prob of exactly 0 has infinite odds and no usable gradient.
    below_one = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    # expm1 keeps the digits of 1 - p that exp loses near p = 1.
    return below_one - torch.log(-torch.expm1(below_one))


def _check_smoothing(kind: str, label_smoothing: float) -> None:
    """Raise for a label smoothing that this kind does not use or that makes it meaningless."""
    key = "label_smoothing"
    if kind not in SMOOTHED_DPO_KINDS:
        remedy = f"{kind} has no label smoothing; set it to 0, or use one of {', '.join(SMOOTHED_DPO_KINDS)}"
        check_range(key, label_smoothing, label_smoothing == 0, remedy)
    elif kind == "exo_pair":
        holds = 0 < label_smoothing < 1
        check_range(key, label_smoothing, holds, "exo_pair needs a value between 0 and 1, such as 0.001")
    elif kind == "robust":
        check_range(key, label_smoothing, 0 <= label_smoothing < 0.5, "robust needs 0 or more, below 0.5")
    else:
        check_range(key, label_smoothing, 0 <= label_smoothing < 1, "use 0 or more, below 1")
