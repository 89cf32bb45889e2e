"""Progress display for a person who watches the run: a progress bar on a terminal, plain lines elsewhere. First process
only."""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megarl.callbacks.trainer_state import EVALUATION, is_evaluation, planned_steps, readings, steps_taken, unit
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.progress import shows_bars, terminal_taken

logger = get_logger(__name__)

_REFRESH_S = 0.1
_STANDARD_ERROR = re.compile(r"_se(@|$)")  # in the name of a metric; values of a sweep follow the @


def _count(value: float) -> str:
    """Format a number in short: 1234.5 as 1.23k."""
    for letter, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


_SHOWN: dict[str, Callable[[float], str]] = {
    "rollout/score": lambda value: f"score {value:.4f}",
    "rollout/score_before_replacing": lambda value: f"before replacing {value:.4f}",
    "rollout/kl": lambda value: f"kl {value:.4f}",
    "train/loss": lambda value: f"loss {value:.4f}",
    "train/grad_norm": lambda value: f"grad norm {value:.3f}",
    "train/lr": lambda value: f"lr {value:.2e}",
    "perf/tokens_per_second": lambda value: f"{_count(value)} tokens/s",
}


@dataclass
class RunProgress:
    """The progress of a run, and its latest metrics."""

    step: int
    total: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    eta_s: float | None = None
    unit: str = "step"

    @property
    def steps(self) -> str:
        """The step and the total, as in `step 3/10`."""
        return f"{self.unit} {self.step}" if self.total is None else f"{self.unit} {self.step}/{self.total}"

    def details(self) -> str:
        """Return the most important metrics of those that were logged, and the remaining time."""
        parts = [show(self.metrics[name]) for name, show in _SHOWN.items() if name in self.metrics]
        if self.eta_s is not None:
            parts.append(f"eta {duration(self.eta_s)}")
        return "  ".join(parts)

    def evaluated(self) -> str:
        """Return the metrics of the last evaluation, without their standard errors."""
        shown = {name: value for name, value in self.evaluation.items() if not _STANDARD_ERROR.search(name)}
        return "  ".join(f"{name.removeprefix(EVALUATION)} {value:.4g}" for name, value in shown.items())


class ProgressDisplay(Callback):
    """Tracks the progress of a run for a display. The remaining time is estimated from the steps of this process
    alone."""

    def __init__(self, log_every: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.log_every = log_every
        self.progress = RunProgress(0, None)
        self._now = now
        self._first_step = 0
        self._began = 0.0

    def begin(self) -> None:
        """Show that the first step is about to start. A display overrides this."""

    def stepped(self) -> None:
        """Show that a step is done. A display overrides this."""

    def end(self) -> None:
        """Stop the display; also called when the run fails. A display overrides this."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the display at the step that the run starts from."""
        if trainer.is_global_zero:
            self._first_step, self._began = steps_taken(trainer), self._now()
            self.progress = RunProgress(steps_taken(trainer), planned_steps(trainer), unit=unit(trainer))
            self.begin()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Update the step, the metrics and the remaining time."""
        if not trainer.is_global_zero:
            return
        progress = self.progress
        progress.step = steps_taken(trainer)
        progress.metrics = readings(trainer, lambda name: name in _SHOWN)
        taken = progress.step - self._first_step
        if progress.total is not None and taken > 0:
            progress.eta_s = (self._now() - self._began) / taken * (progress.total - progress.step)
        self.stepped()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Update the metrics of the last evaluation and log them."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.progress.step = steps_taken(trainer)
        self.progress.evaluation = readings(trainer, is_evaluation)
        if self.progress.evaluation:
            logger.info("%s  evaluation: %s", self.progress.steps, self.progress.evaluated())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the display."""
        if trainer.is_global_zero:
            self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the display, so that the error is shown below it."""
        if trainer.is_global_zero:
            self.end()


class PlainProgress(ProgressDisplay):
    """Logs one line every `log_every` steps and one for the last step."""

    def stepped(self) -> None:
        """Log a line if it is due."""
        if self.progress.step % self.log_every == 0 or self.progress.step == self.progress.total:
            logger.info("%s  %s", self.progress.steps, self.progress.details())


class RichProgress(ProgressDisplay):
    """A progress bar with a line of metrics below it; log lines appear above.

    The training loop draws it, at most every 0.1 s: a separate drawing thread could hold a lock at the moment when
    data-loading processes are forked.
    """

    def __init__(
        self,
        log_every: int,
        console: Console | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(log_every, now)
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=self._console,
            expand=True,
        )
        self._live: Live | None = None
        self._taken = ExitStack()
        self._section = self._section_drawn = ""
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also show what the run does within a step, as a phase may take minutes."""
        super().on_train_start(trainer, pl_module)
        clock = getattr(pl_module, "clock", None)
        if clock is not None and trainer.is_global_zero:
            clock.listen(self._entered)

    def begin(self) -> None:
        """Draw the bar."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task("train", total=self.progress.total, completed=self.progress.step)
        self._live = Live(self._render(), console=self._console, auto_refresh=False)
        self._live.start()
        self._taken.enter_context(terminal_taken())

    def stepped(self) -> None:
        """Redraw the bar, at most every 0.1 s."""
        if self._now() - self._drawn >= _REFRESH_S or self.progress.step == self.progress.total:
            self._draw()

    def end(self) -> None:
        """Draw the final state and release the terminal."""
        if self._live is not None:
            self._section = ""
            self._draw()
            self._live.stop()
            self._live = None
            self._taken.close()

    def _entered(self, section: str) -> None:
        """Redraw if another section of the run begins; sections end too often for that."""
        if section and section != self._section_drawn:
            self._section = section
            self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.progress.step)
            self._live.update(self._render(), refresh=True)
            self._drawn, self._section_drawn = self._now(), self._section

    def _render(self) -> Group:
        now = f"now: {self._section}" if self._section else ""
        lines = [Text("  ".join(filter(None, (self.progress.details(), now))) or "waiting for the first step")]
        if self.progress.evaluation:
            lines.append(Text(f"last evaluation: {self.progress.evaluated()}", style="dim"))
        return Group(self._bar, *lines)


def make_progress(kind: str, log_every: int) -> list[ProgressDisplay]:
    """Return the display for `trainer.progress`: a list of one, empty for none.

    Args:
        kind: auto (rich on a terminal, else plain), rich, plain or none.
        log_every: number of steps between plain lines.
    """
    if kind == "auto":
        kind = "rich" if shows_bars(kind) and Console(stderr=True).is_terminal else "plain"
    if kind == "rich":
        return [RichProgress(log_every)]
    if kind == "plain":
        return [PlainProgress(log_every)]
    if kind == "none":
        return []
    raise ConfigError(
        f"trainer.progress={kind} is not a valid display: choose from auto, rich, plain, none",
        key="trainer.progress",
        value=kind,
        offers={"trainer.progress": ["auto", "rich", "plain", "none"]},
    )


def duration(seconds: float) -> str:
    """Format seconds as H:MM:SS."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
