"""Stops a run whose numbers cannot be trusted, and keeps the batch that it happened on."""

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
    """Raises `NumericsError` where anything that a step or an evaluation logged is not finite, and at the end of
    training where a weight is not.

    Every process writes its part of the step's batch, `module.last_batch` (a list of microbatches),
    to `nan-batch-rank<R>.pt` in the run folder; also where the step itself raised `NumericsError`, as the optimizer
    does before it would apply such gradients. All processes are given the same loss, so all of them stop.
    """

    def __init__(self, run_folder: str | os.PathLike[str]) -> None:
        self.folder = Path(run_folder)
        self.started = False  # what is refused before the first step is of no step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, value in readings(trainer, _is_watched).items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} at {unit(trainer)} {steps_taken(trainer)}{self._dumped(trainer, pl_module)}: "
                    "look for broken records in it, or lower optim.lr",
                    key=name,
                    value=value,
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in readings(trainer, is_evaluation).items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} after {unit(trainer)} {steps_taken(trainer)}: look for broken records in "
                    "data.eval, or go on from an earlier checkpoint with a lower optim.lr",
                    key=name,
                    value=value,
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engines: Any = getattr(pl_module, "engines", {})
        for engine in engines.values():
            engine.refuse_not_finite()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NumericsError) and self.started and trainer.training and _NAMED not in str(exception):
            # The step knew what went wrong, but neither its number nor the file; the user is shown one message.
            where = f"at {unit(trainer)} {steps_taken(trainer) + 1}{self._dumped(trainer, pl_module)}"
            exception.args = (f"{exception} ({where})", *exception.args[1:])

    def _dumped(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Dump the batch and say so, in words that go on a sentence."""
        batch = getattr(pl_module, "last_batch", None)
        if batch is None:
            return f", {_NAMED} unknown"
        if not batch:  # nothing was trained on yet
            return ""
        path = self.folder / f"nan-batch-rank{trainer.global_rank}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save([_on_cpu(microbatch.tensors()) for microbatch in batch], path)
        except OSError as problem:  # the numbers are the news, not the disk
            logger.error("%s could not be written: %s", path, problem)
            return f", {_NAMED} not saved"
        return f", {_NAMED} in {path}"


_NAMED = "the batch is"


def _is_watched(name: str) -> bool:
    return not is_evaluation(name) and not name.startswith("perf/")


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}
