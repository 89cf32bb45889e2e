"""The configuration of `python -m megarl.train_sft`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megarl.config.leaf import section
from megarl.config.offers import Rule
from megarl.config.rules import sequences_fit_model
from megarl.config.sections.data import DataConfig
from megarl.config.sections.trainer import TrainerConfig
from megarl.config.trees import TrainingTree


@dataclass
class SFTConfig(TrainingTree):
    """The keys of supervised fine-tuning."""

    rules: ClassVar[tuple[Rule, ...]] = (*TrainingTree.rules, sequences_fit_model)

    data: DataConfig = section(DataConfig)
    trainer: TrainerConfig = section(TrainerConfig)
