"""What a run starts from: an evaluation before the first training step, where the module can evaluate by itself."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import steps_taken
from megarl.errors import NumericsError
from megarl.logging import get_logger

logger = get_logger(__name__)


class InitialEvaluation(Callback):
    """Lightning's evaluations only come after steps; this one is logged at step 0 and left in `module.baseline` and
    `module.samples`.

    A module that can do it has `evaluation`, which may be None, and `evaluate()`. A resumed run has had its baseline,
    and one that is never evaluated has none.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        never = trainer.limit_val_batches == 0
        if never or steps_taken(trainer) > 0 or getattr(pl_module, "evaluation", None) is None:
            return
        evaluated = pl_module.evaluate()  # type: ignore[operator]
        for name, value in evaluated.metrics.items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} before training: look for broken records in data.eval", key=name, value=value
                )
        pl_module.baseline = evaluated.metrics  # type: ignore[assignment]
        pl_module.samples = evaluated.samples  # type: ignore[assignment]
        for entry in trainer.loggers:
            entry.log_metrics(evaluated.metrics, step=0)
        said = "  ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in evaluated.metrics.items())
        logger.info("before training  evaluation: %s", said)
