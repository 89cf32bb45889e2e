"""Warns when a run loses most of its progress and does not recover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import readings, steps_taken, unit
from megarl.logging import get_logger
from megarl.report.falls import PATIENCE, SCORE, SCORE_NOISE, SPREAD, Fall, standard_error

log = get_logger(__name__)

REMEDY = "a lower optim.lr"


class Collapse(Callback):
    """Watches the phases' mean score and the metric that ranks checkpoints. Warns once of each collapse, with settings
    to try.

    A module may define `remedy_of_collapse`: settings to try instead of a lower learning rate.
    """

    def __init__(
        self,
        metric: str,
        mode: str,
        best_checkpoint: Callable[[], Path | None],
        scorers: Callable[[], dict[str, str]] = dict,
    ) -> None:
        """
        Args:
            metric, mode: of the section `checkpoint`.
            best_checkpoint: returns the best checkpoint that is kept.
            scorers: returns the fingerprints of the functions whose scores are read, by configuration key.
        """
        self.metric, self.mode, self.sign = metric, mode, 1.0 if mode == "max" else -1.0
        self.best_checkpoint, self.scorers = best_checkpoint, scorers
        self.falls: dict[str, Fall] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the evaluation before the first step as a reading."""
        baseline = getattr(pl_module, "baseline", None) or {}
        if self.metric in baseline and self.metric not in self.falls:
            self._take(trainer, self.metric, baseline[self.metric])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the mean score of the phase as a reading."""
        there = readings(trainer)
        if SCORE in there:
            self._take(trainer, SCORE, there[SCORE], SCORE_NOISE * there.get(SPREAD, 0.0))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the metric that ranks checkpoints as a reading."""
        there = readings(trainer)
        if not trainer.sanity_checking and self.metric != SCORE and self.metric in there:
            value = there[self.metric]
            error = standard_error(value, there.get("eval/score"), there.get("eval/score_se"))
            self._take(trainer, self.metric, value, error=error)

    def state_dict(self) -> dict[str, Any]:
        """Return the readings, and the metric, mode and scorers that they come from."""
        return {**self._source(), "falls": {name: asdict(fall) for name, fall in self.falls.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore readings, except those of another metric, mode or scoring function."""
        source = self._source()
        if state_dict.get("scorers") != source["scorers"]:
            return
        same_metric = all(state_dict[key] == source[key] for key in ("metric", "mode"))
        self.falls = {
            name: Fall(**fields) for name, fields in state_dict["falls"].items() if name == SCORE or same_metric
        }

    def found(self) -> list[dict[str, Any]]:
        """Return the metrics that have collapsed, in the format of summary.json."""
        return [
            {
                "metric": name,
                "best": self._sign(name) * (fall.best or 0.0),
                "best_step": fall.best_step,
                "since_step": fall.since,
                "last": self._sign(name) * fall.last,
                "best_checkpoint": None if (best := self.best_checkpoint()) is None else str(best),
            }
            for name, fall in self.falls.items()
            if fall.collapsed
        ]

    def _source(self) -> dict[str, Any]:
        return {"metric": self.metric, "mode": self.mode, "scorers": self.scorers()}

    def _take(self, trainer: Trainer, name: str, value: float, noise: float | None = None, error: float = 0.0) -> None:
        fall = self.falls.setdefault(name, Fall())
        before = fall.collapsed
        fall.add(steps_taken(trainer), self._sign(name) * value, noise, error)
        if fall.collapsed and fall.down == PATIENCE:
            self._warn(trainer, name, fall)
        elif before and not fall.collapsed:
            log.info("%s has recovered: %.4g", name, value)

    def _warn(self, trainer: Trainer, name: str, fall: Fall) -> None:
        step, sign, best = unit(trainer), self._sign(name), self.best_checkpoint()
        log.warning(
            "%s has collapsed: %.4g at its best, in %s %d, and %.4g now, down since %s %d; %s; try %s",
            *(name, sign * (fall.best or 0.0), step, fall.best_step, sign * fall.last, step, fall.since),
            "the best checkpoint is not kept (set trainer.eval_every and checkpoint.best.keep)"
            if best is None
            else f"the best checkpoint is {best}",
            getattr(trainer.lightning_module, "remedy_of_collapse", REMEDY),
        )

    def _sign(self, name: str) -> float:
        return 1.0 if name == SCORE else self.sign
