"""What callbacks read from a Trainer: the metrics logged so far, and the progress of the run."""

from collections.abc import Callable

from lightning.pytorch import Trainer

EVALUATION = "eval/"
_BOOKKEEPING = ("step", "epoch")


def readings(trainer: Trainer, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, float]:
    """Return the latest value of every logged metric whose name is wanted, including those of this step."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name not in _BOOKKEEPING and wanted(name)
    }


def is_evaluation(name: str) -> bool:
    """Return whether evaluations, not training steps, measure this metric."""
    return name.startswith(EVALUATION)


def logging_interval(trainer: Trainer) -> int:
    """Return the number of steps between two loggings."""
    return max(int(trainer.log_every_n_steps), 1)  # type: ignore[attr-defined]


def steps_taken(trainer: Trainer) -> int:
    """Return the training steps of the run so far, before a resume too. A module's own count wins, as its step may be a
    phase."""
    return int(getattr(trainer.lightning_module, "steps_done", trainer.global_step))


def planned_steps(trainer: Trainer) -> int | None:
    """Return the training steps of the whole run; None without a limit."""
    planned = getattr(trainer.lightning_module, "planned", None)
    if planned is not None:
        return int(planned)
    return trainer.max_steps if trainer.max_steps >= 0 else None


def unit(trainer: Trainer) -> str:
    """Return what a training step is called: step or phase."""
    return str(getattr(trainer.lightning_module, "unit", "step"))
