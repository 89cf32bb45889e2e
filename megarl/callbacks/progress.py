"""Progress display for a person who watches the run: a panel on a terminal and in a notebook, plain lines elsewhere.
First process only."""

import html
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from megarl.callbacks.panel import Paper, panel
from megarl.callbacks.run_progress import FORMATS, HEADLINES, PEAK_MEMORY, RunProgress, Shown
from megarl.callbacks.throughput import memory_gb
from megarl.callbacks.trainer_state import is_evaluation, planned_steps, readings, steps_taken, unit
from megarl.clock import Clock
from megarl.errors import ConfigError
from megarl.logging import get_logger, is_progress_bar_enabled
from megarl.progress import in_notebook, shows_bars, terminal_taken

logger = get_logger(__name__)

_STEP_S = 0.5
"""Seconds between two steps that are drawn."""
_SECTIONS_PER_SECOND = 8
"""Drawings because a section begins; with those of steps, there are ten a second."""
_NOTEBOOK = Paper(width=82, height=100)


class ProgressDisplay(Callback):
    """Tracks the progress of a run for a display. The remaining time is estimated from the steps of this process
    alone."""

    def __init__(self, log_every: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.log_every = log_every
        self.progress = RunProgress(0, None)
        self._now = now
        self._first_step = 0
        self._began = 0.0

    def begin(self, module: LightningModule) -> None:
        """Show that the first step is about to start. A display overrides this."""

    def is_due(self) -> bool:
        """Return whether the step that is done is shown, so that its metrics have to be read."""
        raise NotImplementedError

    def stepped(self, module: LightningModule) -> None:
        """Show that a step is done and its metrics are read. A display overrides this."""

    def evaluated(self, module: LightningModule) -> None:
        """Show that an evaluation is done. A display overrides this."""

    def end(self) -> None:
        """Stop the display; also called when the run fails. A display overrides this."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the display at the step that the run starts from."""
        if trainer.is_global_zero:
            self._first_step, self._began = steps_taken(trainer), self._now()
            self.progress = RunProgress(steps_taken(trainer), planned_steps(trainer), unit=unit(trainer))
            self.begin(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the step and the remaining time, and the metrics if they are shown."""
        if not trainer.is_global_zero:
            return
        progress = self.progress
        progress.step = steps_taken(trainer)
        taken = progress.step - self._first_step
        if progress.total is not None and taken > 0:
            progress.eta_s = (self._now() - self._began) / taken * (progress.total - progress.step)
        if self.is_due():
            self.read(trainer, pl_module)

    def read(self, trainer: Trainer, module: LightningModule) -> None:
        """Read the metrics of the step that is done, and show them."""
        self.progress.metrics = readings(trainer, lambda name: name in FORMATS or name == PEAK_MEMORY)
        self.stepped(module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the metrics of the last evaluation and log them."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.progress.step = steps_taken(trainer)
        self.progress.evaluation = readings(trainer, is_evaluation)
        if self.progress.evaluation:
            self.evaluated(pl_module)
            logger.info("%s  evaluation: %s", self.progress.steps, "  ".join(self.progress.evaluated()))

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

    def is_due(self) -> bool:
        """Return whether a line is due."""
        return self.progress.step % self.log_every == 0 or self.progress.step == self.progress.total

    def stepped(self, module: LightningModule) -> None:
        """Log a line."""
        logger.info("%s  %s", self.progress.steps, self.progress.details())


class PanelProgress(ProgressDisplay):
    """A panel that is drawn anew in its place: what runs now, the score or the loss with its trend, metrics, a sample.

    The training loop draws it, at most ten times a second: a separate drawing thread could hold a lock at the moment
    when data-loading processes are forked.
    """

    def __init__(self, log_every: int, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(log_every, now)
        self._open = False
        self._drawn_section = ""
        self._step_drawn = 0.0
        self._sections_drawn: deque[float] = deque(maxlen=_SECTIONS_PER_SECOND)  # when the last ones were
        self._clock = Clock()
        self._totals: dict[str, float] = {}  # seconds of every section at the step that was read last
        self._read_step = 0

    def show(self) -> None:
        """Draw `self.progress`. A subclass overrides this."""
        raise NotImplementedError

    def begin(self, module: LightningModule) -> None:
        """Draw the panel, with the evaluation before the first step if there was one."""
        self._clock = getattr(module, "clock", None) or Clock()
        self._clock.listen(self._entered)
        self._totals, self._read_step = self._section_seconds(), self.progress.step
        self.progress.evaluation = dict(getattr(module, "baseline", {}))
        self._take_evaluated_sample(module)
        self._open, self._step_drawn = True, self._now()
        self._draw()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the step to the trend, and draw it if it is due."""
        if trainer.is_global_zero:
            values = readings(trainer, lambda name: name in HEADLINES)
            self.progress.trend.extend([values[name] for name in HEADLINES if name in values][:1])
        super().on_train_batch_end(trainer, pl_module)

    def is_due(self) -> bool:
        """Return whether this step is the last one, or no step was drawn for a moment."""
        return self._now() - self._step_drawn >= _STEP_S or self.progress.step == self.progress.total

    def stepped(self, module: LightningModule) -> None:
        """Take what the panel shows of a step, and draw it."""
        progress = self.progress
        totals, steps = self._section_seconds(), max(progress.step - self._read_step, 1)
        spent = {name: (seconds - self._totals.get(name, 0.0)) / steps for name, seconds in totals.items()}
        progress.seconds = {name: seconds for name, seconds in spent.items() if seconds > 0}
        self._totals, self._read_step = totals, progress.step
        progress.memory_gb = memory_gb()
        latest = getattr(module, "latest_response", None)
        if latest is not None:
            progress.sample = Shown.of(progress.steps, latest()) or progress.sample
        self._step_drawn = self._now()
        self._draw()

    def evaluated(self, module: LightningModule) -> None:
        """Draw the metrics and a sample of the evaluation."""
        self._take_evaluated_sample(module)
        self._draw_if_rested()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last step if it was not shown, and stop the display."""
        if trainer.is_global_zero and self._read_step < self.progress.step:
            self.read(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def end(self) -> None:
        """Draw the final state, which stays."""
        if self._open:
            self.progress.section, self.progress.took_s = "", self._now() - self._began
            self._draw()
            self._open = False

    def _entered(self, section: str) -> None:
        """Draw if another section of the run begins; sections end too often for that."""
        if section and section != self._drawn_section:
            self.progress.section = section
            self._draw_if_rested()

    def _draw_if_rested(self) -> None:
        drawn, now = self._sections_drawn, self._now()
        if len(drawn) < _SECTIONS_PER_SECOND or now - drawn[0] >= 1.0:
            drawn.append(now)
            self._draw()

    def _draw(self) -> None:
        if self._open:
            self.show()
            self._drawn_section = self.progress.section

    def _section_seconds(self) -> dict[str, float]:
        return {name: part["wall_s"] for name, part in self._clock.totals().items()}

    def _take_evaluated_sample(self, module: LightningModule) -> None:
        rows: Sequence[dict[str, Any]] = getattr(module, "samples", ())
        if rows:
            origin = f"evaluation after {self.progress.steps}" if self.progress.step else "evaluation before training"
            self.progress.sample = Shown.of(origin, rows[0])


class RichProgress(PanelProgress):
    """The panel on a terminal; log lines appear above it."""

    def __init__(
        self,
        log_every: int,
        console: Console | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(log_every, now)
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._taken = ExitStack()

    def begin(self, module: LightningModule) -> None:
        """Take the terminal and draw the panel."""
        # Output that goes to a file must not be redirected to the terminal.
        to_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=to_terminal)
        self._live.start()
        self._taken.enter_context(terminal_taken())
        super().begin(module)

    def show(self) -> None:
        """Draw the panel in its place."""
        if self._live is not None:
            size = self._console.size
            paper = Paper(size.width, size.height, self._console.encoding)
            lines = Text("\n", no_wrap=True, overflow="crop").join(panel(self.progress, paper))
            self._live.update(lines, refresh=True)

    def end(self) -> None:
        """Draw the final state and release the terminal."""
        super().end()
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._taken.close()


class NotebookProgress(PanelProgress):
    """The panel below the cell of a notebook that runs; log lines appear there too."""

    def __init__(self, log_every: int, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(log_every, now)
        self._handle: Any = None

    def begin(self, module: LightningModule) -> None:
        """Draw a new panel, as the cell may run again."""
        self._handle = None
        super().begin(module)

    def show(self) -> None:
        """Draw the panel, in its place after the first time."""
        from IPython.display import display

        text = "\n".join(line.plain for line in panel(self.progress, _NOTEBOOK))
        page = f'<pre style="line-height: 1.3; overflow-x: auto">{html.escape(text)}</pre>'
        picture = {"text/plain": text, "text/html": page}
        if self._handle is None:
            self._handle = display(picture, raw=True, display_id=True)
        else:
            self._handle.update(picture, raw=True)


def make_progress(kind: str, log_every: int) -> list[ProgressDisplay]:
    """Return the display for `trainer.progress`: a list of one, empty for none.

    Args:
        kind: auto (rich on a terminal and in a notebook, else plain), rich, plain or none.
        log_every: number of steps between plain lines.
    """
    notebook = in_notebook()
    if kind == "auto":
        on_terminal = shows_bars(kind) and Console(stderr=True).is_terminal
        kind = "rich" if on_terminal or (notebook and is_progress_bar_enabled()) else "plain"
    if kind == "rich":
        return [NotebookProgress(log_every) if notebook else RichProgress(log_every)]
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
