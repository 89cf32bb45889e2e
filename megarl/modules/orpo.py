"""Odds-ratio preference optimisation."""

from torch import Tensor

from megarl.algorithms import orpo_odds_ratio_loss
from megarl.config.preference import ORPOConfig
from megarl.modules.preference import PairPreference, Responses


class ORPO(PairPreference):
    """Odds-ratio preference optimisation: supervised fine-tuning on the preferred response with its prompt, and a term
    that prefers it to the rejected one. It has no reference."""

    config: ORPOConfig
    with_prompt = True
    nll_coef = 1.0

    def pair_losses(self, responses: Responses) -> Tensor:
        """Return the negative odds-ratio term."""
        means = responses.logprobs / responses.lengths
        return -orpo_odds_ratio_loss(means[0::2], means[1::2], self.config.orpo.beta)

    def rewards(self, responses: Responses) -> Tensor:
        """Return beta times the mean log-prob of a response's tokens."""
        return self.config.orpo.beta * responses.logprobs / responses.lengths
