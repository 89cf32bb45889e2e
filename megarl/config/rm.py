"""The configuration of `python -m megarl.train_rm`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.leaf import Section, leaf, section
from megarl.config.offers import Refusal, Rule
from megarl.config.rules import sequences_fit_model
from megarl.config.sections.data import ScoredDataConfig
from megarl.config.sections.trainer import TrainerConfig
from megarl.config.trees import TrainingTree

KINDS = ("ranking", "regression", "steps")


@dataclass
class RewardModelSettings(Section):
    """Reward modelling."""

    kind: str = leaf(
        "ranking",
        "What is learned. ranking: which of several responses to a prompt is better, from pairs or ranked lists; "
        "regression: the score of a response; steps: the score of each step of a response (process rewards).",
        KINDS,
    )
    center_coef: float = leaf(
        0.0,
        "Only for ranking: weight of the squared sum of the two scores of a pair, which keeps scores near 0.",
        at_least=0,
    )
    step_loss: str = leaf(
        "logistic",
        "Only for steps: loss of a step. logistic: the score is the log-odds that the label is 1, and labels are from "
        "0 to 1; squared: the squared difference of score and label.",
        ("logistic", "squared"),
    )
    init_std: float | None = leaf(
        None,
        "Standard deviation of the score head's initial weights (null: 1 / sqrt(model.hidden_size + 1)). With 0 all "
        "scores start at 0.",
        at_least=0,
    )
    normalise: bool = leaf(
        False,
        "Store the mean and the standard deviation of the scores of data.eval with the model, by which reward.model "
        "brings scores to mean 0 and standard deviation 1.",
    )


def reference_set_exists(config: Any, world_size: int) -> None:
    """Scores are normalised on the responses of data.eval."""
    if config.rm.normalise and not config.data.eval:
        raise Refusal(
            "rm.normalise=true needs responses whose scores get mean 0 and standard deviation 1",
            {"rm.normalise": [False]},
            "files in data.eval",
            key="rm.normalise",
            value=True,
        )


@dataclass
class RewardModelConfig(TrainingTree):
    """The keys of reward modelling."""

    rules: ClassVar[tuple[Rule, ...]] = (*TrainingTree.rules, sequences_fit_model, reference_set_exists)

    data: ScoredDataConfig = section(ScoredDataConfig)
    rm: RewardModelSettings = section(RewardModelSettings)
    trainer: TrainerConfig = section(TrainerConfig)
