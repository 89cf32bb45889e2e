"""summary.json: the results of a run, for people and programs that did not watch it."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from megarl.callbacks.collapse import Collapse
from megarl.callbacks.throughput import peak_memory_gb
from megarl.callbacks.trainer_state import is_evaluation, logging_interval, planned_steps, readings, steps_taken, unit
from megarl.clock import Clock
from megarl.config.metric_names import is_lower_better
from megarl.disk import UnreadableError, nan_to_null, parse_object, read_text, write_atomically
from megarl.errors import one_line
from megarl.logging import get_logger

logger = get_logger(__name__)

_RECENT = 5
_RESULT_LINE = "{name}: {first:.4g} at first, {last:.4g} at last, best {best:.4g}, mean of the last five {last5:.4g}"


class Summary(Callback):
    """Collects metrics whenever they are logged or evaluated, and keeps `summary.json` up to date with them.

    `status` is running (updated at every evaluation), finished, stopped (by trainer.max_time, a signal or Ctrl-C, with
    a checkpoint), interrupted (at once, without a checkpoint) or failed. Collected metrics are stored in checkpoints,
    so that a resumed run continues them.
    """

    def __init__(self, run_folder: str | os.PathLike[str], collapse: Collapse | None = None) -> None:
        self.path, self.collapse = Path(run_folder) / "summary.json", collapse
        self._metrics: dict[str, _Series] = {}
        self._step_of_metrics = -1
        self._began = (time.perf_counter(), time.process_time())
        self._earlier = (0.0, 0.0)
        self._peak_memory_gb = 0.0
        self._clock = Clock()
        self._started = False
        self._steps_here = 0  # number of steps of this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the module's clock. Checkpoints are restored after this, and with them the clock's times."""
        self._clock = getattr(pl_module, "clock", self._clock)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the evaluation before training and write the summary."""
        self._started = True
        self._collect(getattr(pl_module, "baseline", {}))
        self._write(trainer, "running")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Collect the metrics of a step whose metrics are logged."""
        self._steps_here += 1
        if steps_taken(trainer) % logging_interval(trainer) == 0:
            self._collect_step(trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Collect the metrics of the evaluation and write the summary."""
        if trainer.sanity_checking:
            return
        self._collect(readings(trainer, is_evaluation))
        self._started = True
        self._write(trainer, "running" if trainer.state.fn == "fit" else "finished")

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Collect the metrics of the last step."""
        self._collect_step(trainer)

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        """Write the final summary and log the main results."""
        total = planned_steps(trainer)
        early = trainer.should_stop and (total is None or steps_taken(trainer) < total)
        self._write(trainer, "stopped" if early else "finished")
        if trainer.is_global_zero:
            self._log_results()
            if not self._steps_here and not early:
                done = (unit(trainer), steps_taken(trainer))
                if total is not None and done[1] > total:
                    logger.info(
                        "%s %d is done already, and this command plans %d: there is nothing to do", *done, total
                    )
                else:
                    logger.info("%s %d, the last one planned, is done already", *done)
            if early:
                logger.info("to resume: run the same command with run.dir=%s run.resume=auto", self.path.parent)

    def _log_results(self) -> None:
        """Log the first and last values of the evaluation metrics, and the run folder."""
        for name, series in sorted(self._metrics.items()):
            if is_evaluation(name):
                values = {key: math.nan if value is None else value for key, value in series.summary().items()}
                logger.info("%s", _RESULT_LINE.format(name=name, **values))
        logger.info("run folder: %s", self.path.parent)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the summary with the status of the failure."""
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        try:
            self._write(
                trainer, "interrupted" if interrupted else "failed", None if interrupted else one_line(exception)
            )
        except OSError as problem:  # a full disk must not hide the first error
            logger.error("%s could not be written: %s", self.path, problem)

    def state_dict(self) -> dict[str, Any]:
        """Return the collected metrics, times and peak memory."""
        wall, cpu = self._seconds()
        return {
            "metrics": {name: series.state() for name, series in self._metrics.items()},
            "step_of_metrics": self._step_of_metrics,
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_memory_gb": self._peak_memory_gb,
            "clock": self._clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the collected metrics, times and peak memory."""
        self._metrics = {name: _Series(name, **kept) for name, kept in state_dict["metrics"].items()}
        self._step_of_metrics = state_dict["step_of_metrics"]
        self._earlier = (state_dict["wall_s"], state_dict["cpu_s"])
        self._peak_memory_gb = state_dict["peak_memory_gb"]
        self._clock.load_state_dict(state_dict["clock"])

    def _collect_step(self, trainer: Trainer) -> None:
        if steps_taken(trainer) != self._step_of_metrics:
            self._step_of_metrics = steps_taken(trainer)
            self._collect(readings(trainer, lambda name: not is_evaluation(name)))

    def _collect(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics.setdefault(name, _Series(name)).add(value)
        self._peak_memory_gb = max(self._peak_memory_gb, peak_memory_gb())

    def _seconds(self) -> tuple[float, float]:
        """Return the wall-clock and CPU seconds of this process since the callback was made, and of earlier ones of the
        run."""
        return (
            self._earlier[0] + time.perf_counter() - self._began[0],
            self._earlier[1] + time.process_time() - self._began[1],
        )

    def _write(self, trainer: Trainer, status: str, error: str | None = None) -> None:
        if not trainer.is_global_zero:
            return
        ending = {
            "status": status,
            **({"error": error} if error is not None else {}),
            "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        # A resume that fails before its checkpoint is restored changes nothing but the status.
        content = self._content(trainer) if self._started else self._earlier_content() or self._content(trainer)
        content.pop("error", None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(nan_to_null({**content, **ending}), indent=2, allow_nan=False) + "\n")

    def _content(self, trainer: Trainer) -> dict[str, Any]:
        wall, cpu = self._seconds()
        self._peak_memory_gb = max(self._peak_memory_gb, peak_memory_gb())
        module: Any = trainer.lightning_module
        there = getattr(module, "rows_there", None)
        return {
            "status": None,  # filled in when written; the first key, where readers look first
            "algorithm": getattr(trainer.lightning_module, "entry", ""),
            "steps": steps_taken(trainer),
            "max_steps": planned_steps(trainer),
            "metrics": {name: series.summary() for name, series in sorted(self._metrics.items())},
            "collapsed": self.collapse.found() if self.collapse is not None else [],
            **({} if there is None else {"rows": {"read": module.rows_read, "there": there}}),
            "seconds": self._clock.totals(),
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_memory_gb": self._peak_memory_gb,
            "world_size": trainer.world_size,
        }

    def _earlier_content(self) -> dict[str, Any] | None:
        """Return what an earlier process of the run wrote; None if that cannot be read."""
        try:
            return parse_object(read_text(self.path))
        except UnreadableError:
            return None


class _Series:
    """The values of one metric, as far as the summary needs them."""

    def __init__(
        self,
        name: str,
        first: float | None = None,
        last: float | None = None,
        best: float | None = None,
        recent: list[float] | None = None,
    ) -> None:
        self._better: Callable[[float, float], float] = min if is_lower_better(name) else max
        self._first, self._last, self._best, self._recent = first, last, best, list(recent or [])

    def add(self, value: float) -> None:
        self._first = value if self._first is None else self._first
        self._last = value
        self._recent = [*self._recent, value][-_RECENT:]
        if math.isfinite(value):
            self._best = value if self._best is None else self._better(self._best, value)

    def summary(self) -> dict[str, float | None]:
        mean = sum(self._recent) / len(self._recent) if self._recent else None
        return {"first": self._first, "last": self._last, "best": self._best, "last5": mean}

    def state(self) -> dict[str, Any]:
        return {"first": self._first, "last": self._last, "best": self._best, "recent": list(self._recent)}
