"""The algorithms as pure tensor functions: no Megatron, no Lightning, no configuration, no globals.

Tensors are right-padded [batch, time], and each entry belongs to the token at its position. `mask` is 1 where the
policy chose the token. Masked-out entries may have any value and never affect a result or a gradient.
"""

from megarl.algorithms.advantages import (
    gae,
    per_token_rewards,
    reinforce_pp_advantages,
    remax_advantages,
    reward_to_go,
    whiten,
)
from megarl.algorithms.aggregate import AGGREGATIONS, aggregate, aggregation_count, mask_out
from megarl.algorithms.corrections import importance_weights
from megarl.algorithms.dialogs import ILQLBatch, collate_dialogs, ilql_batch, standardize_returns
from megarl.algorithms.entropy import AdaptiveEntropy, FixedEntropy
from megarl.algorithms.groups import (
    grpo_advantages,
    opo_advantages,
    reinforce_pp_baseline_advantages,
    rloo_advantages,
)
from megarl.algorithms.ilql import ilql_loss, ilql_scores, next_state_values
from megarl.algorithms.kl import KL_KINDS, KL_LOSS_KINDS, AdaptiveKL, FixedKL, KLController, kl_estimate, kl_loss
from megarl.algorithms.moments import RunningMoments
from megarl.algorithms.ppo import OBJECTIVES, RATIOS, ppo_policy_loss, ppo_value_loss
from megarl.algorithms.preference import (
    CPO_KINDS,
    DPO_KINDS,
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_odds_ratio_loss,
    simpo_loss,
)
from megarl.algorithms.ranking import bradley_terry_loss, count_units, leads, ranked_pairs, ranking_loss

__all__ = [
    "AGGREGATIONS",
    "CPO_KINDS",
    "DPO_KINDS",
    "KL_KINDS",
    "KL_LOSS_KINDS",
    "OBJECTIVES",
    "RATIOS",
    "AdaptiveEntropy",
    "AdaptiveKL",
    "FixedEntropy",
    "FixedKL",
    "ILQLBatch",
    "KLController",
    "RunningMoments",
    "aggregate",
    "aggregation_count",
    "bradley_terry_loss",
    "collate_dialogs",
    "cpo_loss",
    "dpo_loss",
    "next_state_values",
    "gae",
    "grpo_advantages",
    "ilql_batch",
    "ilql_loss",
    "ilql_scores",
    "importance_weights",
    "kl_estimate",
    "kl_loss",
    "kto_loss",
    "mask_out",
    "opo_advantages",
    "orpo_odds_ratio_loss",
    "per_token_rewards",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reinforce_pp_advantages",
    "reinforce_pp_baseline_advantages",
    "remax_advantages",
    "reward_to_go",
    "rloo_advantages",
    "simpo_loss",
    "standardize_returns",
    "whiten",
    "count_units",
    "leads",
    "ranked_pairs",
    "ranking_loss",
]
