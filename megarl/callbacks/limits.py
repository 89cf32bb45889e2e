"""Limits of a run: stops it after the last planned step, or before its time is up, with a checkpoint."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.checkpoints import Checkpoints
from megarl.callbacks.trainer_state import planned_steps, steps_taken, unit
from megarl.logging import get_logger

log = get_logger(__name__)


def parse_duration(text: str) -> timedelta:
    """Convert "HH:MM:SS" to a duration. Hours may exceed 23."""
    hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


class StepLimit(Callback):
    """Ends a run whose steps Lightning does not count: its steps are phases of many optimizer steps each."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run that has all planned steps already."""
        self._stop_at_end(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop the run after the last planned step."""
        self._stop_at_end(trainer)

    def _stop_at_end(self, trainer: Trainer) -> None:
        planned = planned_steps(trainer)
        if planned is not None and steps_taken(trainer) >= planned:
            trainer.should_stop = True


class TimeLimit(Callback):
    """Stops a run after a time limit, which counts from the start of this process; a resume has the whole limit
    again."""

    def __init__(self, limit: timedelta, checkpoints: Checkpoints) -> None:
        self.limit, self.checkpoints = limit, checkpoints
        self.start = time.monotonic()
        self.reached = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save a checkpoint and stop the run if the limit is reached."""
        elapsed = time.monotonic() - self.start
        # The first rank's clock decides, so that all ranks stop after the same step.
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
