"""Stops a run before it writes into a run folder that another run has taken over."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Ownership(Callback):
    """Checks the lock of the run folder before anything is written there, as the lock's thread may have been
    suspended."""

    def __init__(self, check: Callable[[], None]) -> None:
        """
        Args:
            check: `check` of the run's lock; it ends the process if another run has taken the folder over.
        """
        self.check = check

    def on_train_batch_start(self, *args: Any) -> None:
        """Check the lock."""
        self.check()

    def on_train_batch_end(self, *args: Any) -> None:
        """Check the lock before other callbacks write."""
        self.check()

    def on_validation_end(self, *args: Any) -> None:
        """Check the lock before other callbacks write."""
        self.check()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the lock before the checkpoint is written."""
        self.check()
