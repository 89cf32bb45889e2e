"""The step that every logger writes beside a metric."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import steps_taken


class StepAxis(Callback):
    """Makes loggers count training steps taken, as everything else in a run does.

    Left alone, Lightning numbers batches from 0: what was measured after step 50 would stand at 49. A metric called
    `step` overrides that and is not itself logged.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("step", float(steps_taken(trainer)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            pl_module.log("step", float(steps_taken(trainer)))
