"""The step that every logger writes with a metric."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import steps_taken


class StepAxis(Callback):
    """Makes loggers count completed training steps, like everything else in a run.

    By default Lightning numbers batches from 0, so that the metrics of step 50 would be logged at 49. A logged metric
    named `step` overrides that and is not itself logged.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the number of completed steps as the step of this step's metrics."""
        pl_module.log("step", float(steps_taken(trainer)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the number of completed steps as the step of the evaluation's metrics."""
        if trainer.state.fn == "fit":
            pl_module.log("step", float(steps_taken(trainer)))
