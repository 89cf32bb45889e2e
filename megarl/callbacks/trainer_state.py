"""What callbacks read of a Trainer: the metrics logged so far, and how far the run is."""

from collections.abc import Callable

from lightning.pytorch import Trainer

EVALUATION = "eval/"
_BOOKKEEPING = ("step", "epoch")


def readings(trainer: Trainer, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, float]:
    """The latest value of every logged metric whose name is wanted, this step's included."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name not in _BOOKKEEPING and wanted(name)
    }


def is_evaluation(name: str) -> bool:
    """Whether a metric is measured by evaluations, not by training steps."""
    return name.startswith(EVALUATION)


def logging_interval(trainer: Trainer) -> int:
    """Steps between two loggings."""
    return max(int(trainer.log_every_n_steps), 1)  # type: ignore[attr-defined]


def steps_taken(trainer: Trainer) -> int:
    """Training steps of the run so far, resumed ones included: a module's own count, where a step is a phase."""
    return int(getattr(trainer.lightning_module, "consumed", trainer.global_step))


def planned_steps(trainer: Trainer) -> int | None:
    """Training steps of the whole run; None where no limit was set."""
    planned = getattr(trainer.lightning_module, "planned", None)
    if planned is not None:
        return int(planned)
    return trainer.max_steps if trainer.max_steps >= 0 else None


def unit(trainer: Trainer) -> str:
    """What a training step is called: a step, or a phase."""
    return str(getattr(trainer.lightning_module, "unit", "step"))
