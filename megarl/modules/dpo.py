"""Direct preference optimisation and the losses of its family."""

import torch
from torch import Tensor

from megarl.algorithms import dpo_loss
from megarl.config.preference import DPOConfig
from megarl.modules.preference import PairPreference, Responses


class DPO(PairPreference):
    """Direct preference optimisation: the policy's log-probs relative to a reference, compared within each pair."""

    config: DPOConfig

    def prepare(self) -> None:
        """Take the weight of the cross entropy from the configuration."""
        super().prepare()
        self.nll_coef = self.config.dpo.sft_coef

    def pair_losses(self, responses: Responses) -> Tensor:
        """Return the losses of the configured kinds, added with their weights."""
        settings = self.config.dpo
        total = torch.zeros_like(responses.logprobs[0::2])
        for kind, weight in settings.kinds.items():
            scale = responses.lengths if self._averages(kind) else torch.ones_like(responses.lengths)
            policy, reference = responses.logprobs / scale, responses.reference / scale
            total = total + weight * dpo_loss(
                policy[0::2],
                policy[1::2],
                reference[0::2],
                reference[1::2],
                settings.beta,
                kind,
                settings.label_smoothing,
            )
        return total

    def _averages(self, kind: str) -> bool:
        return kind == "ipo" or self.config.dpo.average_logprobs

    def rewards(self, responses: Responses) -> Tensor:
        """Return beta times the log-prob gained over the reference, averaged over tokens where all kinds do that."""
        gains = responses.gains
        if all(self._averages(kind) for kind in self.config.dpo.kinds):
            gains = gains / responses.lengths
        return self.config.dpo.beta * gains
