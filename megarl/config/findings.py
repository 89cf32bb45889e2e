"""The names of findings about runs, which `health.stop_on` may list; docs/findings.md explains them."""

FINDINGS = (
    "score_collapsed",
    "kl_runaway",
    "loss_diverges",
    "gradients_explode",
    "gradients_dead",
    "entropy_collapsed",
    "no_learning",
    "learning_rate_ended",
    "reward_hacking",
    "score_follows_length",
    "groups_without_spread",
    "value_explains_nothing",
    "clipping_always",
    "clipping_never",
    "responses_cut",
    "logprob_drift",
    "reward_calls_failed",
    "evaluation_gap",
    "data_repeated",
    "waiting_for_rewards",
)
"""In the order in which equally severe ones are listed."""
