"""An evaluation before the first training step, where the module can evaluate by itself."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import steps_taken
from megarl.errors import NumericsError
from megarl.logging import get_logger
from megarl.progress import waiting

logger = get_logger(__name__)


class InitialEvaluation(Callback):
    """Evaluates at step 0, as Lightning evaluates only after steps. Logs the result and stores it in `module.baseline`
    and `module.samples`.

    A module supports this with `evaluation`, which may be None, and `evaluate()`. A resumed run has its baseline
    already, and a run without evaluations has none.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a new run and log the metrics at step 0."""
        never = trainer.limit_val_batches == 0
        if never or steps_taken(trainer) > 0 or getattr(pl_module, "evaluation", None) is None:
            return
        with waiting("evaluating before training", after_s=0):
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
        shown = "  ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in evaluated.metrics.items())
        logger.info("before training  evaluation: %s", shown)
