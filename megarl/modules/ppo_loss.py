"""The loss of PPO and its relatives over a microbatch: policy, entropy, KL and a shared critic's values."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megarl.algorithms import aggregate, aggregation_count, kl_loss, mask_out, ppo_policy_loss
from megarl.config.ppo import PPOConfig
from megarl.experience.shaping import Shaping
from megarl.models.gpt import GPT, TokenLogprobs
from megarl.modules.critics import Critic
from megarl.parallel.engine import Stats
from megarl.parallel.rows import Microbatch


class TokenLogprobsOf(Protocol):
    """Returns the log-probs of a microbatch's targets, and their entropy where it is asked for."""

    def __call__(self, model: GPT, hidden: Tensor, batch: Microbatch, entropy: bool = False) -> TokenLogprobs:
        """Return them."""


class PolicyLoss:
    """The loss that the settings describe. Its sums are divided by counts over the whole minibatch."""

    def __init__(self, config: PPOConfig, shaping: Shaping, critic: Critic, logprobs: TokenLogprobsOf) -> None:
        """
        Args:
            config: the configuration.
            shaping: has the present coefficients of entropy and KL.
            critic: adds its loss where it shares the trunk.
            logprobs: computes the log-probs.
        """
        self.settings, self.longest = config.ppo, float(config.rollout.max_new_tokens)
        self.shaping, self.critic, self.logprobs = shaping, critic, logprobs

    def __call__(self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
        """Return the policy loss with the entropy bonus, the KL loss and a shared critic's value loss, as
        configured."""
        ppo, rows, mask = self.settings, batch.rows, batch.rows.action_mask
        how = {"norm": self.longest, "denominator": counts["units"]}
        entropy_coef = self.shaping.entropy_control.value
        out = self.logprobs(model, hidden, batch, entropy=entropy_coef > 0)
        logprobs = batch.gather_rows(out.logprobs)
        loss, found = ppo_policy_loss(
            logprobs,
            rows["old_logprobs"],
            rows["advantages"],
            mask,
            clip_low=ppo.clip_low,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip,
            ratio=ppo.ratio,
            aggregation=ppo.aggregation,
            objective=ppo.objective,
            weights=rows.per_token.get("weights"),
            **how,
        )
        # Where the loss counts rows, statistics are means over the microbatch's tokens: weight them by its share.
        share = 1.0 if ppo.aggregation == "token_mean" else mask.sum() / max(counts["tokens"], 1.0)
        stats = {f"policy/{key}": found[key] * share for key in ("clip_fraction", "approx_kl", "ratio")}
        if ppo.dual_clip is not None:
            stats["policy/dual_clip_fraction"] = found["dual_clip_fraction"] * share
        stats["policy/loss"] = loss
        if out.entropy is not None:
            entropy = aggregate(batch.gather_rows(out.entropy), mask, ppo.aggregation, **how)
            loss = loss - entropy_coef * entropy
            stats["policy/entropy"] = entropy
        if ppo.kl_in == "loss" and "ref_logprobs" in rows:
            policy, reference, old = (mask_out(x, mask) for x in (logprobs, rows["ref_logprobs"], rows["old_logprobs"]))
            kl = aggregate(kl_loss(policy, reference, old, ppo.kl_kind), mask, ppo.aggregation, **how)
            loss = loss + self.shaping.kl_control.value * kl
            stats["policy/kl_loss"] = kl
        value_loss, value_stats = self.critic.loss_beside(model, hidden, batch, counts)
        loss = loss + value_loss
        return loss, {**stats, **value_stats, "loss": loss}

    def count(self, batch: Microbatch) -> Stats:
        """Return the number of response tokens of a microbatch, and of what the loss is averaged over."""
        mask = batch.rows.action_mask
        return {"tokens": mask.sum(), "units": aggregation_count(mask, self.settings.aggregation)}
