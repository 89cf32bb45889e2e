"""Stops a run that logged or computed NaN or infinity, and saves the batch on which it happened."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import is_evaluation, readings, steps_taken, unit
from megarl.errors import NumericsError
from megarl.logging import get_logger

logger = get_logger(__name__)


class Health(Callback):
    """Raises `NumericsError` if a metric of a step or an evaluation is not finite, or a weight at the end of training.

    Every process writes its share of the step's batch, `module.last_batch` (a list of microbatches), to
    `nan-batch-rank<R>.pt` in the run folder. It does so too if the step itself raised `NumericsError`, as the optimizer
    does before it applies such gradients. All processes see the same loss, so all of them stop.
    """

    def __init__(self, run_folder: str | os.PathLike[str]) -> None:
        self.folder = Path(run_folder)
        self.started = False  # whether training steps began; earlier errors belong to none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attribute errors to training steps from now on."""
        self.started = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Dump the batch and raise `NumericsError` if a metric of the step is not finite."""
        for name, value in readings(trainer, _is_watched).items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} at {unit(trainer)} {steps_taken(trainer)}{self._dumped(trainer, pl_module)}: "
                    "look for broken records in it, or lower optim.lr",
                    key=name,
                    value=value,
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `NumericsError` if a metric of the evaluation is not finite."""
        for name, value in readings(trainer, is_evaluation).items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} after {unit(trainer)} {steps_taken(trainer)}: look for broken records in "
                    "data.eval, or resume from an earlier checkpoint with a lower optim.lr",
                    key=name,
                    value=value,
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `NumericsError` if a weight is not finite."""
        engines: Any = getattr(pl_module, "engines", {})
        for engine in engines.values():
            engine.refuse_not_finite()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Dump the batch of a step that raised `NumericsError`, and add the step and the file to the message."""
        if isinstance(exception, NumericsError) and self.started and trainer.training and _NAMED not in str(exception):
            # The message of the step lacks its number and the file. The user sees a single message.
            where = f"at {unit(trainer)} {steps_taken(trainer) + 1}{self._dumped(trainer, pl_module)}"
            exception.args = (f"{exception} ({where})", *exception.args[1:])

    def _dumped(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Dump the batch, and return a clause for the message that names the file."""
        batch = getattr(pl_module, "last_batch", None)
        if batch is None:
            return f", {_NAMED} unknown"
        if not batch:  # no training batch in this step yet
            return ""
        path = self.folder / f"nan-batch-rank{trainer.global_rank}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save([_on_cpu(microbatch.tensors()) for microbatch in batch], path)
        except OSError as problem:  # must not hide the first error
            logger.error("%s could not be written: %s", path, problem)
            return f", {_NAMED} not saved"
        return f", {_NAMED} in {path}"


_NAMED = "the batch is"


def _is_watched(name: str) -> bool:
    return not is_evaluation(name) and not name.startswith("perf/")


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}
