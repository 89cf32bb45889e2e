"""When checkpoints are written, and which are kept: the last few and the best few."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from megarl.callbacks.trainer_state import is_evaluation, planned_steps, readings, steps_taken
from megarl.checkpoint import ShardedCheckpointIO, find, remove, step_folder, tidy
from megarl.clock import Clock
from megarl.config.sections.run import CheckpointConfig
from megarl.errors import CheckpointError, NothingToLearnError
from megarl.logging import get_logger

log = get_logger(__name__)


class Checkpoints(Checkpoint):
    """Saves at the end of a step, after its evaluation if there is one, so that the metric is known.

    A checkpoint is deleted only after its successor is complete, background saves included.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, eval_every: int | None) -> None:
        self.folder, self.config, self.eval_every = folder, config, eval_every
        self.ranking = config.best_settings
        self.measured: dict[str, dict[str, float]] = {}  # metrics of evaluated checkpoints, by folder name
        self.saved_step = -1
        self.warned = False  # that checkpoint.best.metric is not logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move checkpoints of later steps than the restored one away; stop all ranks if that fails."""
        self._io(trainer).restoring = None
        here = self._start_from(steps_taken(trainer)) if trainer.is_global_zero else ({}, None)
        self.measured, problem = trainer.strategy.broadcast(here)
        if problem is not None:
            raise problem

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save if a checkpoint is due and no evaluation follows at this step."""
        self._io(trainer).poll()
        step = steps_taken(trainer)
        evaluation_follows = self.eval_every is not None and step % self.eval_every == 0
        if self._due(step) and not evaluation_follows:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due or the metric is among the best."""
        if trainer.sanity_checking or (not trainer.training and trainer.state.fn != "fit"):
            return
        self._warn_of_missing_metric(trainer)
        measured = self._measured(trainer)
        score = measured.get(self.ranking.metric)
        if self._due(steps_taken(trainer)) or (score is not None and self._among_best(score)):
            self._save(trainer, measured)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, wait for background saves, and delete checkpoints that are not kept."""
        if self.config.save_last and self.saved_step != steps_taken(trainer):
            self._save(trainer)
        self._io(trainer).wait()
        self._prune(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the weights of the last step if all ranks end for want of a signal, before they change any."""
        step = steps_taken(trainer)
        if isinstance(exception, NothingToLearnError) and self.config.save_last and step not in (0, self.saved_step):
            self._save(trainer)
            self._io(trainer).wait()

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics of evaluated checkpoints."""
        return {"measured": {name: dict(values) for name, values in self.measured.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all metrics of evaluated checkpoints, as this run may rank by another metric than the earlier one."""
        if "measured" in state_dict:
            self.measured = {name: dict(values) for name, values in state_dict["measured"].items()}
        else:  # the format of earlier versions
            self.measured = {name: {self.ranking.metric: score} for name, score in state_dict["scores"].items()}

    @property
    def scores(self) -> dict[str, float]:
        """The ranking metric of evaluated checkpoints, by folder name."""
        metric = self.ranking.metric
        return {name: values[metric] for name, values in self.measured.items() if metric in values}

    def best(self) -> Path | None:
        """Return the folder of the kept checkpoint with the best metric; None if there is none."""
        ranked = self._ranked(self.scores)
        return self.folder / ranked[0] if ranked else None

    def stop(self, trainer: Trainer) -> None:
        """Save and end the run after this step, for a reason outside the schedule (a time limit, a signal).

        Lightning evaluates whenever it stops early. Here only an evaluation that is due at this step still runs. If
        steps are left, the module's `stops_early` tells it to save what it has, without computing anything.
        """
        module: Any = trainer.lightning_module
        planned = planned_steps(trainer)
        module.stops_early = planned is None or steps_taken(trainer) < planned
        if self.saved_step != steps_taken(trainer):
            self._save(trainer)
        self._io(trainer).wait()
        trainer.should_stop = True
        if self.eval_every is None or steps_taken(trainer) % self.eval_every:
            trainer.limit_val_batches = 0

    def _save(self, trainer: Trainer, measured: dict[str, float] | None = None) -> None:
        step = steps_taken(trainer)
        path = step_folder(self.folder, step)
        if measured:
            self.measured[path.name] = measured
        self.saved_step = step
        with getattr(trainer.lightning_module, "clock", Clock()).part("save"):
            trainer.save_checkpoint(path)
        self._prune(trainer)

    def _start_from(self, step: int) -> tuple[dict[str, dict[str, float]], CheckpointError | None]:
        """Tidy the folder on the first rank. Return the metrics of the checkpoints that stay, and the error if it
        fails."""
        try:
            tidy(self.folder, step)
        except CheckpointError as problem:
            return {}, problem
        there = {path.name for path in find(self.folder)}
        return {name: values for name, values in self.measured.items() if name in there}, None

    def _prune(self, trainer: Trainer) -> None:
        """Delete checkpoints that are neither among the last nor among the best. Incomplete ones count as neither."""
        if not trainer.is_global_zero:
            return
        names = [path.name for path in find(self.folder)]
        scores = {name: score for name, score in self.scores.items() if name in names}
        keep = set(names[-self.config.keep_last :]) | set(self._ranked(scores)[: self.ranking.keep])
        for name in names:
            if name not in keep:
                remove(self.folder / name)

    def _due(self, step: int) -> bool:
        return self.config.every is not None and step % self.config.every == 0 and step != self.saved_step

    def _measured(self, trainer: Trainer) -> dict[str, float]:
        """Return the finite metrics of the evaluation that just ended, and checkpoint.best.metric even if training logs
        it."""
        found = readings(trainer, lambda name: is_evaluation(name) or name == self.ranking.metric)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _warn_of_missing_metric(self, trainer: Trainer) -> None:
        """Warn once, after an evaluation, if checkpoint.best.metric is not logged: no best checkpoint can be kept."""
        there = readings(trainer)
        if self.warned or self.ranking.keep == 0 or self.ranking.metric in there:
            return
        self.warned = True
        log.warning(
            "checkpoint.best.metric=%s is not logged, so no best checkpoint is kept: choose from %s",
            self.ranking.metric,
            ", ".join(sorted(filter(is_evaluation, there))) or "the logged metrics",
        )

    def _among_best(self, score: float) -> bool:
        if self.ranking.keep == 0:
            return False
        ranked = self._ranked(self.scores)
        if len(ranked) < self.ranking.keep:
            return True
        worst = self.scores[ranked[self.ranking.keep - 1]]
        return score < worst if self.ranking.mode == "min" else score > worst

    def _ranked(self, scores: dict[str, float]) -> list[str]:
        return sorted(scores, key=lambda name: scores[name], reverse=self.ranking.mode == "max")

    def _io(self, trainer: Trainer) -> ShardedCheckpointIO:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, ShardedCheckpointIO)
        return io
