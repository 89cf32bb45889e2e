"""The description of a model's adapters, and the places of the linear layers that have them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LINEARS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
"""The linear layers of a transformer layer by name, and their places in it."""
ADAPTER = ".adapter."
"""What the names of all parameters of adapters contain."""


@dataclass(frozen=True)
class Parts:
    """The parts of a linear layer that have adapters.

    Attributes:
        modules: their names in the Hugging Face family, `{}` for the number of the layer.
        rows: for each part, the rows of the whole layer that it computes, in the family's order.
        count: number of rows of the layer, of which some may have no adapter.
    """

    modules: tuple[str, ...]
    rows: tuple[Tensor, ...] = field(repr=False, compare=False)
    count: int

    def of_rows(self) -> Tensor | None:
        """Return which part computes each row, [rows, parts] of 0 and 1; None if one part computes all."""
        if len(self.rows) == 1 and len(self.rows[0]) == self.count:
            return None
        found = torch.zeros(self.count, len(self.rows))
        for part, rows in enumerate(self.rows):
            found[rows, part] = 1.0
        return found


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model.

    Attributes:
        kind: lora or dora.
        rank: rank of the factors.
        alpha, rslora: what `scaling` is computed from.
        dropout: dropout of their inputs.
        parts: the adapted parts of each linear layer, by the layer's name in `LINEARS`.
        first_layer: number of the first layer with adapters.
        base_bits: bits of the frozen weights: 16 for the model's own dtype.
        family: the Hugging Face family whose modules the parts are.
    """

    kind: str
    rank: int
    alpha: float
    rslora: bool
    parts: dict[str, Parts]
    dropout: float = 0.0
    first_layer: int = 0
    base_bits: int = 16
    family: str = "llama"

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    def shapes(self, name: str, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the whole shapes of a linear layer's factors by their names in the adapter."""
        parts = self.parts[name]
        found: dict[str, tuple[int, ...]] = {
            "down": (len(parts.modules) * self.rank, columns),
            "up": (parts.count, self.rank),
        }
        return {**found, "magnitude": (parts.count,)} if self.kind == "dora" else found
