"""The configuration of `python -m megarl.evaluate`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.leaf import leaf, section
from megarl.config.offers import Refusal, Rule
from megarl.config.reward_terms import MODEL
from megarl.config.rules import responses_are_scored, responses_fit_model, scoring_ends_in_time
from megarl.config.sections.data import HeldOutDataConfig
from megarl.config.sections.evaluation import GuidedEvalConfig
from megarl.config.sections.reward import MetricConfig, RewardConfig
from megarl.config.sections.rollout import GuidedResponsesConfig
from megarl.config.sections.run import FolderConfig
from megarl.config.sections.trainer import ScoringProcessesConfig
from megarl.config.trees import Tree


def model_is_stored(config: Any, world_size: int) -> None:
    """Require a stored model."""
    if config.model.path is None:
        raise Refusal(
            "model.path is empty: name the model to evaluate, such as a run folder, for example model.path=runs/mine",
            key="model.path",
        )


def prompts_are_named(config: Any, world_size: int) -> None:
    """Require prompts to evaluate on."""
    if not config.data.eval:
        raise Refusal(
            "data.eval is empty: name files of prompts, for example data.eval=[questions.jsonl]",
            key="data.eval",
            value=config.data.eval,
        )


def responses_differ(config: Any, world_size: int) -> None:
    """Refuse several responses per prompt where all would be equal. A sweep may have 0 among other temperatures."""
    if config.rollout.temperature == 0 and config.eval.n > 1 and not config.eval.sweep.temperature:
        raise Refusal(
            f"rollout.temperature=0 gives eval.n={config.eval.n} equal responses per prompt, and best@k and pass@k "
            "would mean nothing",
            {"eval.n": [1], "rollout.temperature": [1]},
            key="eval.n",
            value=config.eval.n,
        )


@dataclass
class EvaluateConfig(Tree):
    """The keys of an evaluation of a trained model."""

    rules: ClassVar[tuple[Rule, ...]] = (
        model_is_stored,
        prompts_are_named,
        *Tree.rules,
        responses_fit_model,
        responses_are_scored,
        scoring_ends_in_time,
        responses_differ,
    )

    out: str | None = leaf(
        None,
        "JSON file, which must not exist yet, for the measures and the settings that they depend on (null: "
        "evaluation.json in the run folder).",
    )
    samples: str | None = leaf(
        None,
        "JSON-lines file, which must not exist yet, for the responses with their scores, one per line (null: they are "
        "only in the run folder).",
    )
    chunk: int = leaf(
        256,
        "Number of prompts that are answered and scored together and then stored. An interrupted evaluation repeats at "
        "most this many.",
        at_least=1,
        at_most=2**20,
    )
    run: FolderConfig = section(FolderConfig)
    data: HeldOutDataConfig = section(HeldOutDataConfig)
    rollout: GuidedResponsesConfig = section(GuidedResponsesConfig)
    reward: RewardConfig = section(RewardConfig)
    metric: MetricConfig = section(MetricConfig)
    eval: GuidedEvalConfig = section(GuidedEvalConfig)
    trainer: ScoringProcessesConfig = section(ScoringProcessesConfig)

    def more_folders(self) -> dict[str, str]:
        """Return the files that the evaluation writes, by key."""
        return {key: value for key, value in (("out", self.out), ("samples", self.samples)) if value is not None}

    def more_models(self) -> dict[str, str]:
        """Return the paths of the reward models."""
        return {term.key: term.value for term in self.reward.sources if term.kind == MODEL}
