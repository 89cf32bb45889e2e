"""Progress bars of waits outside the training loop: imports, loading, cloning, evaluating, converting, planning.

A bar appears on a terminal only, in the first process only, and if `trainer.progress` and `disable_progress_bar()` do
not forbid it. Elsewhere nothing is printed. The work that is waited for draws it, not a thread, which could hold a lock
at the moment when another process is forked.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from megarl.command import process_number
from megarl.logging import is_progress_bar_enabled

if TYPE_CHECKING:
    from rich.progress import Progress

AFTER_S = 1.0
"""Seconds that a wait may last without a bar."""
_REFRESH_S = 0.1


class _Shown:
    """What is displayed in this process."""

    kind = "auto"  # trainer.progress of the run
    busy = False  # a bar, or the display of a training loop, has the terminal


def choose_display(kind: str) -> None:
    """Let `trainer.progress` decide about the bars of this process: with plain and none there are no bars."""
    _Shown.kind = kind


def shows_bars(kind: str | None = None) -> bool:
    """Return whether a bar is shown: with `auto`, on a terminal whose bars nobody disabled; with `rich`, always.

    Args:
        kind: auto, rich, plain or none (None: what `choose_display` was told).
    """
    kind = _Shown.kind if kind is None else kind
    return kind == "rich" or (kind == "auto" and is_progress_bar_enabled() and _on_terminal())


def in_notebook() -> bool:
    """Return whether this process runs the cells of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


@contextmanager
def terminal_taken() -> Iterator[None]:
    """Show no bar while something else draws on the terminal."""
    before, _Shown.busy = _Shown.busy, True
    try:
        yield
    finally:
        _Shown.busy = before


@contextmanager
def waiting(task: str, total: int | None = None, *, after_s: float = AFTER_S) -> Iterator[Callable[[], None]]:
    """Show a bar while the `with` block runs, and remove it at the end. Yield a function to call after each part.

    Args:
        task: what is waited for, in a few words.
        total: number of parts; None if there are none: then the bar only says what is waited for.
        after_s: seconds before the bar is drawn; 0 if the first part may take longer than that.
    """
    if _Shown.busy or not (shows_bars() and _on_terminal()) or process_number() != 0:
        yield lambda: None
        return
    bar = _Bar(task, total, after_s)
    with terminal_taken():
        try:
            yield bar.advance
        finally:
            bar.close()


def waiting_for_imports() -> AbstractContextManager[object]:
    """Show, while the `with` block runs, that torch is imported, which takes seconds; nothing if it is there."""
    return nullcontext() if "torch" in sys.modules else waiting("importing torch and Megatron", after_s=0)


class _Bar:
    """A bar that is drawn once it is due, and then at most every 0.1 s."""

    def __init__(self, task: str, total: int | None, after_s: float) -> None:
        self._task, self._total, self._done = task, total, 0
        self._due = time.monotonic() + after_s
        self._progress: Progress | None = None
        if after_s <= 0:
            self._draw()

    def advance(self) -> None:
        """Count a part, and draw if it is time to."""
        self._done += 1
        if time.monotonic() >= self._due:
            self._draw()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _draw(self) -> None:
        if self._progress is None:
            self._progress = self._started()
        self._progress.update(self._progress.task_ids[0], completed=self._done)
        self._progress.refresh()
        self._due = time.monotonic() + _REFRESH_S

    def _started(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) if self._total is not None else ()
        progress = Progress(
            TextColumn("{task.description}" if self._total is not None else "{task.description} ..."),
            *columns,
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        progress.add_task(self._task, total=self._total)
        progress.start()
        return progress
