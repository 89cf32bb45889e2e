"""`trainer/exp_manager=nemo`: the Trainer goes through NeMo's `exp_manager` for its folder and its callbacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from megarl.errors import ConfigError, UnavailableError, one_line

OURS = {
    "create_checkpoint_callback": "checkpoints are sharded, and saved as checkpoint.* says",
    "create_preemption_callback": "megarl saves and stops at the edge of a step by itself",
    "resume_if_exists": "run.resume says where a run continues",
    "resume_from_checkpoint": "run.resume says where a run continues",
    "disable_validation_on_resume": "it would replace Lightning's loop",
    "create_tensorboard_logger": "logger.tensorboard does that",
    "create_wandb_logger": "logger.wandb does that",
    "create_mlflow_logger": "logger.mlflow does that",
    "explicit_log_dir": "it is nemo/ in the run folder",
    "exp_dir": "it is nemo/ in the run folder",
    "max_time_per_run": "trainer.max_time does that",
}
"""Keys of NeMo's that would do a second time, in another way, what megarl does."""


def settings(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What NeMo is given: the user's keys, its folder, and off what is megarl's own."""
    for key in options:
        if key in OURS:
            raise ConfigError(
                f"trainer.exp_manager_options.{key} is not NeMo's to say here: {OURS[key]}; leave it out",
                key=f"trainer.exp_manager_options.{key}",
                value=options[key],
            )
    off = {key: False for key in OURS if key.startswith(("create_", "disable_", "resume_if"))}
    return {**off, "log_tflops_per_sec_per_gpu": False, "explicit_log_dir": str(folder), **options}


def attach_nemo_exp_manager(trainer: Trainer, options: Mapping[str, Any], run_dir: Path) -> None:
    """Let NeMo's exp_manager add its files, in nemo/ of the run folder, and its callbacks to a Trainer of megarl's."""
    given = settings(options, run_dir / "nemo")
    try:
        from nemo.utils.exp_manager import exp_manager
    except ImportError as problem:
        raise UnavailableError(
            f"trainer.exp_manager=nemo, but NeMo cannot be imported ({one_line(problem)}): pip install 'megarl[nemo]', "
            "or leave trainer/exp_manager out",
            key="trainer.exp_manager",
            value="nemo",
        ) from problem
    loggers, trainer.loggers = trainer.loggers, []  # it takes its folder from a logger, where there is one
    try:
        exp_manager(trainer, given)
    except Exception as problem:  # NeMo's own kinds of error, which cannot be named where it is not installed
        raise ConfigError(
            f"trainer.exp_manager=nemo does not start ({one_line(problem)}): see trainer.exp_manager_options",
            key="trainer.exp_manager",
            value="nemo",
        ) from problem
    finally:
        trainer.loggers = [*loggers, *trainer.loggers]
