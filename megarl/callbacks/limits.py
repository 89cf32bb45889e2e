"""Ends a run cleanly before its time is up, at the edge of a step, with a checkpoint."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.checkpoints import Checkpoints
from megarl.callbacks.trainer_state import planned_steps, steps_taken, unit
from megarl.logging import get_logger

log = get_logger(__name__)


def parse_duration(text: str) -> timedelta:
    """ "HH:MM:SS" as a duration; hours may exceed 23."""
    hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


class StepLimit(Callback):
    """Ends a run whose steps Lightning does not count: those that are phases, each of many optimizer steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_at_end(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._stop_at_end(trainer)

    def _stop_at_end(self, trainer: Trainer) -> None:
        planned = planned_steps(trainer)
        if planned is not None and steps_taken(trainer) >= planned:
            trainer.should_stop = True


class TimeLimit(Callback):
    """Counts from the start of this process, so that a resumed run has the whole limit again."""

    def __init__(self, limit: timedelta, checkpoints: Checkpoints) -> None:
        self.limit, self.checkpoints = limit, checkpoints
        self.start = time.monotonic()
        self.reached = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        elapsed = time.monotonic() - self.start
        # The first rank's clock decides, so that all stop at the same step.
        if not trainer.strategy.broadcast(elapsed >= self.limit.total_seconds()):
            return
        if not self.reached:
            log.info(
                "trainer.max_time=%s is reached at %s %d: saving and stopping",
                self.limit,
                unit(trainer),
                steps_taken(trainer),
            )
            self.reached = True
        self.checkpoints.stop(trainer)
