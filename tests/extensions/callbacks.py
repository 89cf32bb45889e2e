"""A callback of one's own: it writes the score of every phase to a file, and remembers the best."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class BestScore(Callback):
    """Appends each phase's mean score to `path`, and ends the run when the best is `patience` phases ago."""

    def __init__(self, path: str, patience: int = 10) -> None:
        self.path, self.patience = Path(path), patience
        self.best, self.since = float("-inf"), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        score = float(trainer.callback_metrics["rollout/score"])
        self.since = 0 if score > self.best else self.since + 1
        self.best = max(self.best, score)
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{score:.4f} {self.best:.4f}\n")
        trainer.should_stop = trainer.should_stop or self.since >= self.patience

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.since = state["best"], int(state["since"])
