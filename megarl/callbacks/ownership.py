"""Nothing is written into a run folder that another run has taken over."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Ownership(Callback):
    """Looks whether the run folder is still ours before it is written, where the lock's thread could not."""

    def __init__(self, check: Callable[[], None]) -> None:
        """
        Args:
            check: of the run's lock; ends the process where another run has taken the folder over.
        """
        self.check = check

    def on_train_batch_start(self, *args: Any) -> None:
        self.check()

    def on_train_batch_end(self, *args: Any) -> None:
        self.check()

    def on_validation_end(self, *args: Any) -> None:
        self.check()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check()
