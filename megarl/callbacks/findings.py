"""Findings about a run: logged and written to findings.json at its end, and reasons to end it with `health.stop_on`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import is_evaluation, logging_interval, readings, steps_taken, unit
from megarl.disk import nan_to_null, write_atomically
from megarl.errors import DataError, FindingError, one_line
from megarl.logging import get_logger
from megarl.report.data import RunData, read_run
from megarl.report.finding import Finding
from megarl.report.findings import FILE, as_plain, find, line

logger = get_logger(__name__)

_MOST_SAMPLES = 1000  # kept in memory, the newest
_ROWS_PER_CHECK = 1000  # with more rows, checks are that much rarer, so that their share of the time stays the same


class Findings(Callback):
    """Collects what is logged, and says at the end of a run what it shows.

    Problems and warnings are logged, a line each; `findings.json` has all findings, also of a run that failed or was
    interrupted. A resumed run continues with the rows of its folder's metrics.csv.
    """

    def __init__(self, run_folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        """`config` is the configuration as plain values."""
        self.folder, self.config = Path(run_folder), config
        self.rows: dict[int, dict[str, float]] = {}
        self.samples: list[Mapping[str, Any]] = []
        self._started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the rows of an earlier process of this run, and the evaluation before training."""
        self._started = True
        step = steps_taken(trainer)
        if step and trainer.is_global_zero:
            self._continue_from(step)
        if baseline := getattr(pl_module, "baseline", None):
            self.rows.setdefault(step, {"step": step}).update(baseline)
            self._keep(getattr(pl_module, "samples", []))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Collect the metrics of a step that is logged."""
        self.collect_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the metrics and the samples of an evaluation."""
        if not trainer.sanity_checking:
            self.collect_evaluation(trainer)
            self._keep(getattr(pl_module, "samples", []))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write findings.json, and log problems and warnings."""
        self._tell_safely(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same for a run that fails or is interrupted; an error that is a finding says itself what it is."""
        self._tell_safely(trainer, said=exception.value if isinstance(exception, FindingError) else None)

    def _tell_safely(self, trainer: Trainer, said: str | None = None) -> None:
        """Write and log the findings. A failure is logged: it must neither hide an error nor end a run that is done."""
        if self._started and trainer.is_global_zero:
            try:
                self._tell(trainer, said)
            except Exception as problem:
                logger.error("%s could not be written: %s", self.folder / FILE, one_line(problem))

    def collect_step(self, trainer: Trainer) -> None:
        """Collect the metrics of a step that is logged. Collecting twice changes nothing."""
        step = steps_taken(trainer)
        if step % logging_interval(trainer) == 0:
            row = self.rows.setdefault(step, {"step": step})
            row.update(readings(trainer, lambda name: not is_evaluation(name)))

    def collect_evaluation(self, trainer: Trainer) -> None:
        """Collect the metrics of an evaluation. Collecting twice changes nothing."""
        step = steps_taken(trainer)
        self.rows.setdefault(step, {"step": step}).update(readings(trainer, is_evaluation))

    def data(self, trainer: Trainer) -> RunData:
        """Return what findings are found in."""
        module: Any = trainer.lightning_module
        clock, there = getattr(module, "clock", None), getattr(module, "rows_there", None)
        summary = {
            **({} if clock is None else {"seconds": clock.totals()}),
            **({} if there is None else {"rows": {"read": module.rows_read, "there": there}}),
        }
        rows = [self.rows[step] for step in sorted(self.rows)]
        return RunData(self.folder, self.config, rows, summary, self.samples, str(getattr(module, "entry", "")))

    def _continue_from(self, step: int) -> None:
        try:
            earlier = read_run(self.folder)
        except DataError:  # no metrics.csv
            return
        self.rows = {int(row["step"]): dict(row) for row in earlier.rows if row.get("step", step + 1) <= step}
        self._keep([row for row in earlier.samples if row.get("phase", row.get("step", 0)) <= step])

    def _keep(self, samples: list[Any]) -> None:
        self.samples = [*self.samples, *samples][-_MOST_SAMPLES:]

    def _tell(self, trainer: Trainer, said: str | None = None) -> None:
        """Write all findings, and log problems and warnings other than the one that the error has `said`."""
        found = find(self.data(trainer))
        self._write(trainer, found)
        for finding in found:
            if finding.severity != "note" and finding.name != said:
                logger.warning("%s", line(finding))
        if found:
            logger.info("causes, and more to try: %s", self.folder / FILE)

    def _write(self, trainer: Trainer, found: list[Finding]) -> None:
        content = {
            "findings": as_plain(found),
            "unit": unit(trainer),
            "steps": steps_taken(trainer),
            "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / FILE, json.dumps(nan_to_null(content), indent=2, allow_nan=False) + "\n")


class StopOnFinding(Callback):
    """Ends a run as soon as its metrics show one of some findings, before the step is saved."""

    def __init__(self, names: Collection[str], findings: Findings) -> None:
        self.names, self.findings = names, findings
        self._checked = 0  # number of the last logged step that was checked

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Raise `FindingError` if the metrics of the step show a finding."""
        if steps_taken(trainer) % logging_interval(trainer) == 0:
            self.findings.collect_step(trainer)
            logged = steps_taken(trainer) // logging_interval(trainer)  # the same on every rank
            if logged - self._checked >= logged / _ROWS_PER_CHECK:
                self._checked = logged
                self._check(trainer, log_step=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `FindingError` if the metrics of the evaluation show a finding."""
        if not trainer.sanity_checking:
            self.findings.collect_evaluation(trainer)
            self._check(trainer)

    def _first(self, trainer: Trainer) -> Finding | None:
        """Return the worst finding. A finder that fails is logged, as the other processes wait for the answer."""
        try:
            return next(iter(find(self.findings.data(trainer), self.names)), None)
        except Exception as problem:
            logger.error("the findings of health.stop_on cannot be looked for: %s", one_line(problem))
            return None

    def _check(self, trainer: Trainer, *, log_step: bool = False) -> None:
        finding: Finding | None = trainer.strategy.broadcast(self._first(trainer) if trainer.is_global_zero else None)
        if finding is None:
            return
        step = steps_taken(trainer)
        if log_step:  # Lightning logs it after this hook, which does not return
            for one in trainer.loggers:
                one.log_metrics(dict(self.findings.rows[step]), step)
        raise FindingError(
            f"health.stop_on=[{finding.name}] ends the run at {unit(trainer)} {step}: {finding.evidence} Try: "
            f"{finding.remedy}. Checkpoints of earlier {unit(trainer)}s are kept in "
            f"{self.findings.folder / 'checkpoints'}",
            key="health.stop_on",
            value=finding.name,
            where=self.findings.folder,
        )
