"""Adapters: small trained factors beside the frozen weights of a model."""

# ruff: noqa: RUF009 - `leaf` returns a dataclass field

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf
from megarl.config.offers import Refusal

ADAPTER = (
    "Low-rank adapters: the model's weights stay frozen and small factors beside them are trained; null: all weights "
    "train. See docs/adapters.md."
)


@dataclass
class AdapterConfig(Section):
    """The adapters of the models that train."""

    kind: str = leaf(
        "lora",
        "lora: two low-rank factors are added to each target's weight. dora: the sum is also scaled row by row to a "
        "trained length.",
        ("lora", "dora"),
    )
    rank: int = leaf(16, "Rank of the factors. Trained values and their memory grow in proportion to it.", at_least=1)
    alpha: float = leaf(
        32.0,
        "Scale of the factors: their product is multiplied by adapter.alpha / adapter.rank, or, with adapter.rslora, "
        "by adapter.alpha / sqrt(adapter.rank).",
        above=0,
    )
    rslora: bool = leaf(False, "Divide adapter.alpha by the square root of the rank, so that higher ranks learn more.")
    dropout: float = leaf(
        0.0, "Dropout of the factors' inputs in training. The frozen weights see all inputs.", at_least=0, below=1
    )
    targets: list[str] = leaf(
        ["all-linear"],
        "The linear layers with adapters: all-linear for all of the transformer's, or names, ours (linear_qkv, "
        "linear_proj, linear_fc1, linear_fc2) or those of the Hugging Face family (q_proj, c_attn). An encoder-decoder "
        "also has cross_attention.linear_q, linear_kv and linear_proj; encoder.linear_qkv is the encoder's alone.",
    )
    path: str | None = leaf(
        None,
        "Adapter to start from: a PEFT folder, or the folder or a checkpoint of a run with an adapter. It decides the "
        "kind, rank, alpha, rslora and targets (null: new factors, which change nothing until they are trained).",
    )
    base_bits: int = leaf(
        16,
        "Bits in which the transformer's frozen linear layers are kept: 16 as loaded, 8, or 4 (NF4 with quantised "
        "scales, as in QLoRA).",
    )

    def check(self) -> None:
        """Refuse numbers of bits that do not exist, and an empty list of targets."""
        if self.base_bits not in (4, 8, 16):
            raise Refusal(
                f"adapter.base_bits={self.base_bits} is not a valid number of bits",
                {"adapter.base_bits": [4, 8, 16]},
                key="adapter.base_bits",
                value=self.base_bits,
            )
        if not self.targets:
            raise Refusal(
                "adapter.targets=[] leaves nothing to train",
                {"adapter.targets": [["all-linear"]]},
                key="adapter.targets",
                value=self.targets,
            )
