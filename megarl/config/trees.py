"""What the configuration trees of the entry points have in common; their trees are in the files of the algorithms."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from megarl.config.leaf import leaf, optional_section, or_defaults, section
from megarl.config.offers import Rule
from megarl.config.reward_terms import MODEL
from megarl.config.rules import (
    adapter_has_layers,
    adapter_is_exported,
    experts_suit_run,
    exports_differ,
    generation_is_whole,
    model_fits_layout,
    responses_are_sampled,
    responses_are_scored,
    responses_fit_model,
    sampler_has_whole_weights,
    scoring_ends_in_time,
    tokenizer_is_named,
    whole_batches,
    whole_experts,
    whole_replicas,
)
from megarl.config.sections.adapter import ADAPTER, AdapterConfig
from megarl.config.sections.clone import CLONE, CloneConfig
from megarl.config.sections.data import PromptDataConfig
from megarl.config.sections.evaluation import EvalConfig
from megarl.config.sections.extensions import EXTENSIONS, ExtensionsConfig, TrainingExtensionsConfig
from megarl.config.sections.health import HEALTH, HealthConfig
from megarl.config.sections.launch import LaunchConfig
from megarl.config.sections.logger import LoggerConfig
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.sections.reward import MetricConfig, RewardConfig
from megarl.config.sections.rollout import RolloutConfig
from megarl.config.sections.run import EXPORT, CheckpointConfig, ExportConfig, RunConfig, ScoreCheckpointConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.config.sections.trainer import PhaseTrainerConfig


@dataclass
class Tree:
    """The keys of every entry point that builds a model."""

    rules: ClassVar[tuple[Rule, ...]] = (
        model_fits_layout,
        experts_suit_run,
        whole_replicas,
        whole_experts,
        tokenizer_is_named,
    )
    """What must be true of several sections together, in the order in which it is checked."""

    seed: int = leaf(
        1,
        "Seed of everything random: initial weights, the order of the data, sampled tokens, dropout.",
        at_least=0,
    )
    debug: bool = leaf(False, "Show tracebacks of errors, and log more.")
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    extensions: ExtensionsConfig | None = optional_section(ExtensionsConfig, EXTENSIONS, null_is_defaults=True)

    def more_folders(self) -> dict[str, str]:
        """Return the folders that a run writes to besides those of every tree, by key."""
        return {}

    def more_models(self) -> dict[str, str]:
        """Return the paths of stored models that a run uses besides `model.path`, by key."""
        return {}


@dataclass
class TrainingTree(Tree):
    """The keys of every entry point that trains."""

    rules: ClassVar[tuple[Rule, ...]] = (
        model_fits_layout,
        experts_suit_run,
        whole_replicas,
        whole_experts,
        whole_batches,
        tokenizer_is_named,
        adapter_is_exported,
        exports_differ,
        adapter_has_layers,
    )

    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)
    adapter: AdapterConfig | None = optional_section(AdapterConfig, ADAPTER)
    optim: OptimConfig = section(OptimConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    export: ExportConfig | None = optional_section(ExportConfig, EXPORT, null_is_defaults=True)
    health: HealthConfig | None = optional_section(HealthConfig, HEALTH, null_is_defaults=True)
    logger: LoggerConfig = section(LoggerConfig)
    extensions: TrainingExtensionsConfig | None = optional_section(
        TrainingExtensionsConfig, EXTENSIONS, null_is_defaults=True
    )

    @property
    def exports(self) -> ExportConfig:
        """The section `export`, at its defaults where it is null."""
        return cast("ExportConfig", or_defaults(self, "export"))


@dataclass
class GeneratingTree(TrainingTree):
    """The keys of every algorithm that generates, in training or only in evaluations."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *TrainingTree.rules,
        responses_fit_model,
        scoring_ends_in_time,
        generation_is_whole,
        sampler_has_whole_weights,
    )

    checkpoint: ScoreCheckpointConfig = section(ScoreCheckpointConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    reward: RewardConfig = section(RewardConfig)
    metric: MetricConfig = section(MetricConfig)
    eval: EvalConfig = section(EvalConfig)

    def more_models(self) -> dict[str, str]:
        """Return the paths of the reward models."""
        return {term.key: term.value for term in self.reward.sources if term.kind == MODEL}


@dataclass
class PhaseTree(GeneratingTree):
    """The keys of every algorithm that generates the responses it trains on."""

    rules: ClassVar[tuple[Rule, ...]] = (*GeneratingTree.rules, responses_are_scored, responses_are_sampled)

    data: PromptDataConfig = section(PromptDataConfig)
    clone: CloneConfig | None = optional_section(CloneConfig, CLONE, needs="data")
    trainer: PhaseTrainerConfig = section(PhaseTrainerConfig)
