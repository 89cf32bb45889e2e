"""`extensions.nemo=true`: NeMo's `exp_manager` adds its folder and its callbacks to the Trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from megarl.errors import ConfigError, UnavailableError, one_line

OURS = {
    "create_checkpoint_callback": "checkpoint.* configures checkpoints, which are sharded",
    "create_preemption_callback": "megarl itself saves and stops after a step",
    "resume_if_exists": "run.resume selects the checkpoint to resume from",
    "resume_from_checkpoint": "run.resume selects the checkpoint to resume from",
    "disable_validation_on_resume": "it would replace Lightning's loop",
    "create_tensorboard_logger": "logger.tensorboard does that",
    "create_wandb_logger": "logger.wandb does that",
    "create_mlflow_logger": "logger.mlflow does that",
    "explicit_log_dir": "it is nemo/ in the run folder",
    "exp_dir": "it is nemo/ in the run folder",
    "max_time_per_run": "trainer.max_time does that",
}
"""NeMo options that conflict with what megarl does itself, and what to use instead."""


def settings(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return NeMo's settings: the user's options, its folder, and everything off that megarl does itself."""
    for key in options:
        if key in OURS:
            raise ConfigError(
                f"extensions.exp_manager.{key} cannot be used: {OURS[key]}; remove it",
                key=f"extensions.exp_manager.{key}",
                value=options[key],
            )
    off = {key: False for key in OURS if key.startswith(("create_", "disable_", "resume_if"))}
    return {**off, "log_tflops_per_sec_per_gpu": False, "explicit_log_dir": str(folder), **options}


def attach_nemo_exp_manager(trainer: Trainer, options: Mapping[str, Any], run_dir: Path) -> None:
    """Let NeMo's exp_manager add its files, in nemo/ of the run folder, and its callbacks to the Trainer."""
    nemo_settings = settings(options, run_dir / "nemo")
    try:
        from nemo.utils.exp_manager import exp_manager
    except ImportError as problem:
        raise UnavailableError(
            f"extensions.nemo=true, but NeMo cannot be imported ({one_line(problem)}): pip install 'megarl[nemo]', or "
            "set extensions.nemo=false",
            key="extensions.nemo",
            value=True,
            offers={"extensions.nemo": [False]},
        ) from problem
    loggers, trainer.loggers = trainer.loggers, []  # it would take its folder from the first logger
    try:
        exp_manager(trainer, nemo_settings)
    except Exception as problem:  # NeMo's own error classes, which cannot be imported without NeMo
        raise ConfigError(
            f"extensions.nemo=true, but NeMo's exp_manager does not start ({one_line(problem)}): see "
            "extensions.exp_manager",
            key="extensions.nemo",
            value=True,
        ) from problem
    finally:
        trainer.loggers = [*loggers, *trainer.loggers]
