import io
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megarl import progress as waits
from megarl.callbacks import progress
from megarl.callbacks.progress import NotebookProgress, PlainProgress, RichProgress, make_progress
from megarl.callbacks.run_progress import RunProgress
from megarl.callbacks.throughput import Throughput
from megarl.clock import Clock
from megarl.errors import ConfigError
from tests.callbacks.tiny import Ticks, Tiny, train
from tests.e2e.runs import WALKS
from tests.refusals import refused
from tests.terminals import Terminal, screen_after


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    with caplog.at_level(logging.INFO, logger="megarl"):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == "megarl.callbacks.progress"]


def slow(ticks: Ticks, losses: list[float], **arguments: Any) -> Tiny:
    module = Tiny(losses, **arguments)
    module.in_step = lambda step: ticks.pass_(2.0)
    return module


def test_plain_line_every_log_every_steps_and_at_the_end(lines):
    ticks = Ticks()
    train(
        slow(ticks, [5.0, 4.0, 3.0, 2.0, 1.0]),
        [Throughput(now=ticks), PlainProgress(2, now=ticks)],
        steps=5,
        log_every=2,
    )
    assert lines() == [
        "step 2/5  loss 4.0000  grad norm 1.500  lr 5.00e-01  50 tokens/s  eta 0:00:06",
        "step 4/5  loss 2.0000  grad norm 1.500  lr 5.00e-01  50 tokens/s  eta 0:00:02",
        "step 5/5  loss 1.0000  grad norm 1.500  lr 5.00e-01  50 tokens/s  eta 0:00:00",
    ]


def test_plain_shows_evaluations(lines):
    train(Tiny([1.0] * 2, evals=[4.0]), [PlainProgress(10)], steps=2, eval_every=2)
    assert "step 2/2  evaluation: loss 4  accuracy 0.6" in lines()


def test_only_the_first_process_shows_anything(lines, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    train(Tiny([1.0] * 2, evals=[4.0]), [PlainProgress(1)], steps=2, eval_every=2)
    assert lines() == []


def terminal(width: int = 120) -> tuple[io.StringIO, Console]:
    screen = io.StringIO()
    return screen, Console(file=screen, force_terminal=True, width=width, height=24)


def test_panel_shows_steps_metrics_and_last_evaluation():
    screen, console = terminal()
    train(Tiny([3.25] * 4, evals=[4.0, 2.5]), [RichProgress(1, console=console)], steps=4, eval_every=2)
    shown = "\n".join(screen_after(screen.getvalue(), 120, 24))
    assert "step 4/4" in shown
    assert "loss 3.2500" in shown
    assert "grad norm 1.500  lr 5.00e-01" in shown
    assert "last evaluation:  loss 2.5" in shown
    assert "took 0:00:0" in shown
    assert "now:" not in shown


def test_panel_says_what_a_long_phase_does_and_how_long_each_section_of_the_last_one_took():
    screen, console = terminal()
    ticks, module, shown = Ticks(), Tiny([1.0] * 2), []
    module.clock = Clock(wall=ticks)

    def phase(step: int) -> None:
        for section, seconds in (("generate", 3.0), ("score", 1.5)):
            with module.clock.part(section):
                shown.append("\n".join(screen_after(screen.getvalue(), 120, 24)))
                ticks.pass_(seconds)

    module.in_step = phase
    train(module, [RichProgress(1, console=console, now=ticks)], steps=2)
    assert "now: generate" in shown[0]
    assert "now: score" in shown[1]
    assert "last step" not in shown[1]
    assert "now: generate  last step:  generate 3.00s  score 1.50s" in shown[2]


def test_panel_shows_a_response_of_the_last_phase_or_evaluation():
    screen, console = terminal()
    module, shown = Tiny([1.0] * 2, evals=[1.0]), []
    module.latest_response = lambda: {"prompt": "2 + 2", "response": "4", "score": 0.5}
    module.samples = [{"prompt": "held out", "response": "yes", "score": None}]
    module.in_step = lambda step: shown.append("\n".join(screen_after(screen.getvalue(), 120, 24)))
    train(module, [RichProgress(1, console=console, now=Ticking())], steps=2, eval_every=2)
    assert "evaluation before training\nprompt    held out\nresponse  yes" in shown[0]
    assert "step 1/2  score 0.5\nprompt    2 + 2\nresponse  4" in shown[1]
    last = "\n".join(screen_after(screen.getvalue(), 120, 24))
    assert "evaluation after step 2/2\nprompt    held out" in last


class Ticking:
    """A time that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1.0
        return self.time


def test_trend_is_of_the_score_or_of_the_loss_where_there_is_none():
    module = Tiny([4.0, 3.0, 2.0])
    display = RichProgress(1, console=terminal()[1])
    train(module, [display], steps=3)
    assert list(display.progress.trend) == [4.0, 3.0, 2.0]
    module = Tiny([4.0, 3.0])
    module.in_step = lambda step: module.log("rollout/score", step + 0.5)
    train(module, [display], steps=2)
    assert list(display.progress.trend) == [0.5, 1.5]


def test_log_lines_stay_above_the_panel():
    screen, console = terminal(width=40)
    module = Tiny([1.0] * 2)
    module.in_step = lambda step: sys.stderr.write(f"a line of step {step}\n")
    train(module, [RichProgress(1, console=console)], steps=2)
    lines = [line.rstrip() for line in screen_after(screen.getvalue(), 40, 24)]
    assert lines[:2] == ["a line of step 0", "a line of step 1"]
    assert lines[2].startswith("step 2/2")


def test_output_that_goes_to_a_file_does_not_appear_on_the_terminal(capfd):
    screen, console = terminal()
    module = Tiny([1.0])
    module.in_step = lambda step: print("a result")  # noqa: T201
    train(module, [RichProgress(1, console=console)], steps=1)
    assert "a result" not in screen.getvalue()
    assert capfd.readouterr().out == "a result\n"


def test_panel_keeps_other_bars_off_the_terminal():
    taken = []
    module = Tiny([1.0])
    module.in_step = lambda step: taken.append(waits._Shown.busy)
    train(module, [RichProgress(1, console=terminal()[1])], steps=1)
    assert taken == [True]
    assert not waits._Shown.busy


def test_panel_lets_go_of_the_terminal_when_the_run_fails():
    screen, console = terminal()

    def fail(step: int) -> None:
        raise RuntimeError("boom")

    module = Tiny([1.0] * 3)
    module.in_step = fail
    with pytest.raises(RuntimeError, match="boom"):
        train(module, [RichProgress(1, console=console)], steps=3)
    assert screen.getvalue().endswith("\n\x1b[?25h")  # below the panel, and the cursor is back
    console.set_live(object())  # refused (or nested) while another display holds the console
    assert len(console._live_stack) == 1


def test_panel_is_drawn_at_most_ten_times_a_second_however_often_sections_change(monkeypatch):
    ticks, drawings = Ticks(), []
    monkeypatch.setattr(progress.Live, "update", lambda self, picture, refresh: drawings.append(ticks.time))
    module = Tiny([1.0] * 300)

    def phase(step: int) -> None:
        for section in ("generate", "score"):
            with module.clock.part(section):
                ticks.pass_(0.005)

    module.in_step = phase
    train(module, [RichProgress(1, console=terminal()[1], now=ticks)], steps=300)
    drawings = drawings[1:-2]  # without the first state, the last step and the last state
    for first, eleventh in zip(drawings, drawings[10:], strict=False):
        assert eleventh - first >= 1.0
    assert len(drawings) >= 20


def test_a_long_section_after_many_short_ones_is_named():
    screen, console = terminal()
    ticks, module, shown = Ticks(), Tiny([1.0] * 20), []

    def phase(step: int) -> None:
        for section in ("generate", "score", "evaluate"):
            with module.clock.part(section):
                ticks.pass_(0.2)
        with module.clock.part("shape"):
            shown.append("\n".join(screen_after(screen.getvalue(), 120, 24)))
            ticks.pass_(60)

    module.in_step = phase
    train(module, [RichProgress(1, console=console, now=ticks)], steps=20)
    assert all("now: shape" in picture for picture in shown)


def test_of_a_step_that_is_not_drawn_only_the_trend_is_read(monkeypatch):
    ticks, read, readings = Ticks(), [], progress.readings
    monkeypatch.setattr(
        progress, "readings", lambda trainer, wanted: read.extend(found := readings(trainer, wanted)) or found
    )
    module = Tiny([1.0] * 90)
    module.in_step = lambda step: ticks.pass_(0.01)
    train(module, [RichProgress(1, console=terminal()[1], now=ticks)], steps=90)
    assert read.count("train/lr") == 2  # after half a second, and of the last step
    assert read.count("train/loss") == 90 + 2


@pytest.fixture
def notebook(monkeypatch):
    """A kernel's display, with the pictures that it was given: whether each replaced one, and its text."""
    pictures = []

    class Handle:
        def update(self, picture: dict[str, str], raw: bool) -> None:
            pictures.append((True, picture))

    def display(picture: dict[str, str], raw: bool, display_id: bool) -> Handle:
        pictures.append((False, picture))
        return Handle()

    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    return pictures


def test_a_notebook_shows_one_panel_that_changes(notebook):
    display = NotebookProgress(1)
    module = Tiny([1.0] * 2)
    module.latest_response = lambda: {"prompt": "<b>", "response": "&"}
    for _ in range(2):  # a cell may run again
        train(module, [display], steps=2)
    assert [replaced for replaced, _ in notebook].count(False) == 2
    last = notebook[-1][1]
    assert "step 2/2" in last["text/plain"]
    assert "prompt    &lt;b&gt;" in last["text/html"]


@pytest.mark.parametrize(
    ("kind", "where", "expected"),
    [
        ("auto", "terminal", [RichProgress]),
        ("auto", "pipe", [PlainProgress]),
        ("rich", "pipe", [RichProgress]),
        ("plain", "terminal", [PlainProgress]),
        ("none", "terminal", []),
        ("auto", "notebook", [NotebookProgress]),
        ("rich", "notebook", [NotebookProgress]),
        ("plain", "notebook", [PlainProgress]),
        ("none", "notebook", []),
    ],
)
def test_kind_of_display(kind, where, expected, monkeypatch, request):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: where == "terminal", raising=False)
    if where == "notebook":
        request.getfixturevalue("notebook")
    assert [type(display) for display in make_progress(kind, 1)] == expected


def test_unknown_kind_is_refused():
    offers = {"trainer.progress": ["auto", "rich", "plain", "none"]}
    with refused(ConfigError, key="trainer.progress", value="fancy", offers=offers):
        make_progress("fancy", 1)


def test_without_a_limit_no_total_and_no_time_left():
    progress = RunProgress(7, None, {"train/loss": float("nan")})
    assert progress.steps == "step 7"
    assert progress.details() == "loss nan"


# --- the whole program ------------------------------------------------------------------------------------------------


@pytest.mark.gate
def test_a_run_on_a_terminal(tmp_path: Path) -> None:
    walks = [setting for setting in WALKS if not setting.startswith("trainer.progress")]
    settings = [*walks, "clone.steps=4", "trainer.eval_every=1", f"run.dir={tmp_path / 'run'}"]
    environ = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"}
    shell = Terminal([sys.executable, "-m", "megarl", "ppo", *settings], columns=60, environ=environ)
    try:
        printed = shell.rest()
        assert shell.process.wait(timeout=60) == 0
    finally:
        shell.close()
    assert "now: generate" in printed
    assert printed.rfind("\x1b[?25h") > printed.rfind("\x1b[?25l")  # the cursor is shown again
    lines = [line.rstrip() for line in screen_after(printed, 60, 24)]
    bars = [index for index, line in enumerate(lines) if line.startswith("phase 2/2  ━")]
    assert len(bars) == 1, "\n".join(lines)
    (bar,) = bars
    assert "took 0:00:" in lines[bar]
    shown = "\n".join(lines[bar:])
    for item in ("generate ", "evaluate ", "train ", "kl ", "entropy ", "grad norm ", "memory ", "response  "):
        assert item in shown
    assert sum("phase 1/2  evaluation:" in line for line in lines[:bar]) == 1  # log lines stay above it
    assert "\nrun folder: " in shown  # and the results below
