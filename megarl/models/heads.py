"""Heads on a trunk's last hidden state beside the vocabulary: the value of a state."""

import torch
from torch import Tensor, nn

from megarl.models.config import GPTConfig

VALUE = "value_head"


class ValueHead(nn.Module):
    """Linear(h, 2h), ReLU, Linear(2h, 1). The last layer starts at zero, so a fresh critic expects nothing.

    Held whole on every tensor-parallel rank: each sees the same states and computes the same gradient.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.inner = nn.Linear(config.hidden_size, 2 * config.hidden_size, **place)
        self.outer = nn.Linear(2 * config.hidden_size, 1, **place)

    def forward(self, states: Tensor) -> Tensor:
        """[..., hidden] to [...], float32."""
        values: Tensor = self.outer(torch.relu(self.inner(states))).squeeze(-1).float()
        return values
