"""Contrastive preference optimisation, and SimPO."""

from torch import Tensor

from megarl.algorithms import cpo_loss, simpo_loss
from megarl.config.preference import CPOConfig
from megarl.modules.preference import PairPreference, Responses


class CPO(PairPreference):
    """Contrastive preference optimisation: DPO without a reference, and cross entropy of the preferred response."""

    config: CPOConfig

    def prepare(self) -> None:
        """Take the weight of the cross entropy from the configuration."""
        super().prepare()
        self.nll_coef = self.config.cpo.sft_coef

    def pair_losses(self, responses: Responses) -> Tensor:
        """Return the losses of the configured kind."""
        settings, values = self.config.cpo, self._values(responses)
        if settings.kind == "simpo":
            return simpo_loss(values[0::2], values[1::2], settings.beta, settings.gamma, settings.label_smoothing)
        return cpo_loss(values[0::2], values[1::2], settings.beta, settings.kind, settings.label_smoothing)

    def _values(self, responses: Responses) -> Tensor:
        averages = self.config.cpo.kind in ("simpo", "ipo")
        return responses.logprobs / responses.lengths if averages else responses.logprobs

    def rewards(self, responses: Responses) -> Tensor:
        """Return beta times the log-prob of a response, averaged over its tokens for simpo and ipo."""
        return self.config.cpo.beta * self._values(responses)
