"""Every golden case: numbers that other projects' own code returned for the same inputs.

The file's arguments are those of dense functions; the adapters below derive ours from them. Masked-out inputs
hold junk on purpose, and only masked-in outputs are compared.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megarl.algorithms as a

CASES = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
FLOAT32_TOL = 1e-5

Arguments = dict[str, Any]


def policy_terms(loss: Tensor, stats: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "loss": loss,
        "clip_fraction": stats["clip_fraction"],
        "approx_kl": stats["approx_kl"],
        "clip_fraction_dual": stats["dual_clip_fraction"],
    }


def adaptive_kl(init: float, target: float, horizon: float, updates: Tensor) -> dict[str, Any]:
    controller = a.AdaptiveKL(init=init, target=target, horizon=horizon)
    values = []
    for kl, n in updates.tolist():
        controller.update(kl=kl, n=n)
        values.append(controller.value)
    return {"values": torch.tensor(values, dtype=torch.float64)}


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> dict[str, Any]:
    advantages, returns = a.gae(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=lam)
    whitened = a.whiten(x=advantages, mask=mask)
    return {"advantages": advantages, "returns": returns, "whitened_advantages": whitened}


def trlx_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float, use_whitening: bool) -> dict[str, Any]:
    everything = torch.ones_like(rewards)
    advantages, returns = a.gae(rewards=rewards, values=values, mask=everything, gamma=gamma, lam=lam)
    return {
        "advantages": a.whiten(advantages, everything) if use_whitening else advantages,
        "returns": returns,
    }


def per_token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, kind: str
) -> dict[str, Any]:
    kl = a.kl_estimate(logprobs=logprobs, ref_logprobs=ref_logprobs, kind=kind)
    return {"rewards": a.per_token_rewards(scores=scores, kl=kl, mask=mask, kl_coef=kl_coef)}


def ppo_value_loss(**arguments: Any) -> dict[str, Any]:
    loss, stats = a.ppo_value_loss(**arguments)
    return {"loss": loss, "clip_fraction": stats["clip_fraction"]}


def trlx_ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
) -> dict[str, Any]:
    policy, stats = a.ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip_low=cliprange, clip_high=cliprange)
    value, value_stats = a.ppo_value_loss(values, old_values, returns, mask, clip=cliprange_value)
    # trlX's approx_kl is diluted by padding on purpose of nobody: k3 of (new, old), over all slots.
    k3 = a.mask_out(a.kl_estimate(old_logprobs, logprobs, "k3"), mask).mean()
    return {
        "loss": policy + vf_coef * value,
        "policy_loss": policy,
        "value_loss": value,
        "approx_kl": k3,
        "clip_fraction": stats["clip_fraction"],
        "value_clip_fraction": value_stats["clip_fraction"],
        "ratio_mean": stats["ratio"],
    }


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> dict[str, Any]:
    advantages = a.reinforce_pp_advantages(rewards=rewards, mask=mask, gamma=gamma)
    return {"advantages": advantages, "returns": a.reward_to_go(rewards, mask, gamma)}


def remax(rewards: Tensor, baselines: Tensor, mask: Tensor) -> dict[str, Any]:
    advantages = a.remax_advantages(rewards=rewards, baselines=baselines, mask=mask)
    return {"advantages": advantages, "returns": a.reward_to_go(rewards, mask, 1.0)}


def ilql_batch(dialogs: list[Any], rewards: Tensor) -> dict[str, Any]:
    return a.ilql_batch(dialogs, rewards)._asdict()


def ilql_loss(
    logits: Tensor,
    qs: Tensor,
    target_qs: Tensor,
    vs: Tensor,
    input_ids: Tensor,
    actions_ixs: Tensor,
    states_ixs: Tensor,
    dones: Tensor,
    rewards: Tensor,
    two_qs: bool,
    tau: float,
    gamma: float,
    cql_scale: float,
    awac_scale: float,
    beta: float,
) -> dict[str, Any]:
    positions = actions_ixs.long()
    token = input_ids.long().gather(1, positions + 1)
    action_logits = logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    def taken(x: Tensor) -> Tensor:
        return x.gather(-1, token.unsqueeze(-1)).squeeze(-1)

    loss, stats = a.ilql_loss(
        q=[taken(head) for head in qs],
        target_q=[taken(head) for head in target_qs],
        v=vs[:, :-1, 0],
        next_v=vs[:, 1:, 0],
        q_nll=[-taken(head.log_softmax(-1)) for head in qs],
        policy_nll=-taken(action_logits.log_softmax(-1)),
        rewards=rewards,
        not_done=dones[:, 1:],
        mask=dones[:, :-1],
        tau=tau,
        gamma=gamma,
        cql_scale=cql_scale,
        awac_scale=awac_scale,
        awac_beta=beta,
    )
    return {"loss": loss, **stats}


def ilql_logits(
    logits: Tensor,
    qs: Tensor,
    vs: Tensor,
    beta: float,
    top_k: int,
    temperature: float,
    forbidden: Tensor | None,
) -> dict[str, Any]:
    if forbidden is not None:
        logits = logits.masked_fill(forbidden.bool(), -math.inf)
    scores = a.ilql_scores(logits=logits, q=qs.amin(dim=0), v=vs, beta=beta)
    kth = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[:, -1:]
    scores = scores.masked_fill(scores < kth, -math.inf)
    return {"scores": scores, "probs": (scores / temperature).softmax(-1)}


def running_moments(batches: list[list[float]], dtype: torch.dtype) -> dict[str, Any]:
    moments = a.RunningMoments()
    seen = [moments.update(torch.tensor(batch, dtype=dtype)) for batch in batches]
    return {"mean": torch.stack([mean for mean, _ in seen]), "std": torch.stack([std for _, std in seen])}


ADAPTERS: dict[str, Callable[..., dict[str, Any]]] = {
    "kl_estimate": lambda **x: {"value": a.kl_estimate(**x)},
    "adaptive_kl": adaptive_kl,
    "gae": gae,
    "trlx_gae": trlx_gae,
    "whiten": lambda **x: {"value": a.whiten(**x)},
    "per_token_rewards": per_token_rewards,
    "ppo_policy_loss": lambda **x: policy_terms(*a.ppo_policy_loss(**x)),
    "ppo_value_loss": ppo_value_loss,
    "trlx_ppo_loss": trlx_ppo_loss,
    "grpo_advantages": lambda **x: {"advantages": a.grpo_advantages(**x)},
    "rloo_advantages": lambda **x: {"advantages": a.rloo_advantages(**x)},
    "opo_advantages": lambda **x: {"advantages": a.opo_advantages(**x)},
    "reinforce_pp_advantages": reinforce_pp,
    "reinforce_pp_baseline_advantages": lambda **x: {"advantages": a.reinforce_pp_baseline_advantages(**x)},
    "remax_advantages": remax,
    "dpo_loss": lambda **x: {"losses": a.dpo_loss(**x)},
    "kto_loss": lambda **x: {"losses": a.kto_loss(**x)},
    "simpo_loss": lambda **x: {"losses": a.simpo_loss(**x)},
    "cpo_loss": lambda **x: {"losses": a.cpo_loss(**x)},
    "orpo_odds_ratio_loss": lambda **x: {"losses": a.orpo_odds_ratio_loss(**x)},
    "bradley_terry_loss": lambda **x: {"loss": a.bradley_terry_loss(**x)},
    "ilql_batch": ilql_batch,
    "ilql_loss": ilql_loss,
    "ilql_logits": ilql_logits,
}

NOT_TENSORS = ("dialogs", "groups", "batches")


def to_tensor(value: Any, dtype: torch.dtype) -> Tensor:
    """A nested list as a tensor, null as -inf."""

    def number(x: Any) -> Any:
        return [number(item) for item in x] if isinstance(x, list) else (-math.inf if x is None else x)

    return torch.tensor(number(value), dtype=dtype)


def run(case: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    """What our function returns for the case's arguments."""
    arguments = {
        name: to_tensor(value, dtype) if isinstance(value, list) and name not in NOT_TENSORS else value
        for name, value in case["args"].items()
    }
    if case["function"] == "running_moments":
        return running_moments(**arguments, dtype=dtype)
    return ADAPTERS[case["function"]](**arguments)


def assert_meets(case: Arguments, dtype: torch.dtype, tol: float) -> None:
    """Compare every output of the case, at masked-in positions where it is per token."""
    got = run(case, dtype)
    # Further numbers of the oracle, where we return the same quantity.
    extra = {name: value for name, value in case.get("extra", {}).items() if name in got}
    for name, value in {**case["expected"], **extra}.items():
        want = to_tensor(value, torch.float64)
        have = torch.as_tensor(got[name]).to(torch.float64)
        assert have.shape == want.shape, name
        mask = case["args"].get("mask")
        if mask is not None and want.dim() == 2:
            valid = to_tensor(mask, torch.float64).bool()
            assert (have[~valid] == 0).all(), f"{name}: not 0 where masked out"
            have, want = have[valid], want[valid]
        finite = want.isfinite()
        assert torch.equal(have[~finite], want[~finite]), name
        excess = (have - want)[finite].abs() - tol * want[finite].abs().clamp(min=1)
        assert (excess <= 0).all(), f"{name}: {have} is not {want}"  # nan is not <= 0 either


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_float64_meets_the_oracle_within_its_tolerance(case: Arguments) -> None:
    assert_meets(case, torch.float64, case["tol"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_float32_meets_the_oracle_within_rounding(case: Arguments) -> None:
    assert_meets(case, torch.float32, max(FLOAT32_TOL, case["tol"]))


TENSOR_CASES = [case for case in CASES if case["function"] != "adaptive_kl"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", TENSOR_CASES, ids=lambda case: case["name"])
def test_floats_come_back_in_the_dtype_they_came_in(case: Arguments, dtype: torch.dtype) -> None:
    for name, value in run(case, dtype).items():
        if value.is_floating_point():
            assert value.dtype == dtype, name


def test_every_function_of_the_file_is_covered() -> None:
    functions = {case["function"] for case in CASES}
    assert functions == {*ADAPTERS, "running_moments"}
