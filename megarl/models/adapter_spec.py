"""The description of a model's adapters, and the places of the linear layers that have them."""

from __future__ import annotations

from collections.abc import Sequence
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
CROSS_LINEARS = {name: name for name in (f"cross_attention.linear_{part}" for part in ("q", "kv", "proj"))}
"""Those that a layer of the decoder of an encoder-decoder has besides."""
SHARED_LINEARS = {f"shared_experts.{name}": f"mlp.shared_experts.{name}" for name in ("linear_fc1", "linear_fc2")}
"""Those of the shared expert of a mixture of experts, and their places."""
ADAPTER = ".adapter."
"""What the names of all parameters of adapters contain."""


@dataclass(frozen=True)
class Parts:
    """The parts of a linear layer that have adapters.

    Attributes:
        modules: their names in the Hugging Face family, `{}` for the number of the layer, counted from `offset`.
        rows: for each part, the rows of the whole layer that it computes, in the family's order.
        count: number of rows of the layer, of which some may have no adapter.
        place: where the linear layer is in a transformer layer.
        layers: the transformer layers that have it, in order: all, those of the encoder or of the decoder, or in a
            mixture of experts those with or without experts.
        offset: number of the layer that the family counts as 0: the first of the encoder or of the decoder.
    """

    modules: tuple[str, ...]
    rows: tuple[Tensor, ...] = field(repr=False, compare=False)
    count: int
    place: str
    layers: Sequence[int]
    offset: int = 0

    def module(self, part: int, layer: int) -> str:
        """Return the name of a part in the Hugging Face family, in a layer by its number in the whole model."""
        return self.modules[part].format(layer - self.offset)

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
        parts: the adapted parts of each linear layer, by the layer's name in `LINEARS`. In an encoder-decoder, names
            begin with `encoder.` or `decoder.`, and those of `CROSS_LINEARS` are among them. A mixture of experts has
            those of `SHARED_LINEARS` where it has a shared expert, and those of an MLP where layers have a plain one.
        first_layer: number of the first layer that may have adapters.
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

    @property
    def first_adapted(self) -> int:
        """Number of the first layer with adapters."""
        return min(layer for parts in self.parts.values() for layer in parts.layers if layer >= self.first_layer)

    def at(self, layer: int) -> dict[str, Parts]:
        """Return the adapted parts of the linear layers of one transformer layer, by their places in it."""
        if layer < self.first_layer:
            return {}
        return {parts.place: parts for parts in self.parts.values() if layer in parts.layers}

    def shapes(self, parts: Parts, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the whole shapes of a linear layer's factors by their names in the adapter."""
        found: dict[str, tuple[int, ...]] = {
            "down": (len(parts.modules) * self.rank, columns),
            "up": (parts.count, self.rank),
        }
        return {**found, "magnitude": (parts.count,)} if self.kind == "dora" else found
