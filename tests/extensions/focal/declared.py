"""The declaration and the keys, which --help and refusals read: nothing heavy is imported here."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megarl.config.algorithms import Algorithm
from megarl.config.leaf import Section, leaf, section
from megarl.config.sft import SFTConfig


@dataclass
class FocalSettings(Section):
    """The focal loss."""

    gamma: float = leaf(2.0, "Exponent of the weight (1 - p) ** gamma of a token with probability p.", at_least=0)


@dataclass
class FocalConfig(SFTConfig):
    """The keys of supervised fine-tuning, and the loss's own."""

    focal: FocalSettings = section(FocalSettings)


FOCAL = Algorithm(
    "focal",
    config=FocalConfig,
    module=f"{Path(__file__).with_name('module.py')}:Focal",
    about="Supervised fine-tuning that pays less attention to tokens that are predicted well.",
    learns_from="samples",
    defaults={"optim.lr": 5e-4, "focal.gamma": 1.0},
    first_keys=("model.path", "data.train", "focal.gamma"),
)
