"""TRL's PPOTrainer of 0.11 and before, over `megarl.Session`: a script changes its imports.

    from megarl.compat.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
    from megarl.compat.trl.core import respond_to_batch

docs/migrate.md lists what differs.
"""

from megarl.compat.trl.config import PPOConfig
from megarl.compat.trl.model import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)
from megarl.compat.trl.trainer import PPOTrainer

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
]
