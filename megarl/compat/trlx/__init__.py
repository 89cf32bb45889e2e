"""trlX's interface over `megarl.train`: `trlx.train`, its configurations, and the pipelines and orchestrators of its
first version. docs/migrate.md says what differs."""

from megarl import logging
from megarl.compat.trlx.config import TRLConfig, default_ilql_config, default_ppo_config, default_sft_config
from megarl.compat.trlx.tasks import (
    AcceleratePPOModel,
    BasePipeline,
    BaseRLModel,
    PPOOrchestrator,
    PromptBatch,
    PromptElement,
    get_model,
    get_orchestrator,
    get_pipeline,
    register_datapipeline,
    register_orchestrator,
)
from megarl.compat.trlx.trainer import Trainer, train

__all__ = [
    "AcceleratePPOModel",
    "BasePipeline",
    "BaseRLModel",
    "PPOOrchestrator",
    "PromptBatch",
    "PromptElement",
    "TRLConfig",
    "Trainer",
    "default_ilql_config",
    "default_ppo_config",
    "default_sft_config",
    "get_model",
    "get_orchestrator",
    "get_pipeline",
    "logging",
    "register_datapipeline",
    "register_orchestrator",
    "train",
]
