import io
import logging
from typing import Any

import pytest
from rich.console import Console

from megarl import progress as waits
from megarl.callbacks import progress
from megarl.callbacks.progress import PlainProgress, RichProgress, RunProgress, duration, make_progress
from megarl.callbacks.throughput import Throughput
from megarl.clock import Clock
from megarl.errors import ConfigError
from tests.callbacks.tiny import Ticks, Tiny, train
from tests.refusals import refused


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


def test_rich_bar_shows_steps_metrics_and_last_evaluation():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    display = RichProgress(1, console=console)
    train(Tiny([3.25] * 4, evals=[4.0, 2.5]), [display], steps=4, eval_every=2)
    shown = screen.getvalue()
    assert "4/4" in shown
    assert "loss 3.2500  grad norm 1.500  lr 5.00e-01" in shown
    assert "last evaluation: loss 2.5" in shown


def test_rich_bar_says_what_a_long_phase_does():
    screen = io.StringIO()
    module = Tiny([1.0])
    module.clock = Clock()

    def phase(step: int) -> None:
        for section in ("generate", "score"):
            with module.clock.part(section):
                shown.append(screen.getvalue())

    shown: list[str] = []
    module.in_step = phase
    train(module, [RichProgress(1, console=Console(file=screen, force_terminal=True, width=120))], steps=1)
    assert "now: generate" in shown[0]
    assert "now: score" not in shown[0]
    assert "now: score" in shown[1]
    assert "now:" not in screen.getvalue().splitlines()[-1]


def test_rich_bar_keeps_other_bars_off_the_terminal(monkeypatch):
    taken = []
    module = Tiny([1.0])
    module.in_step = lambda step: taken.append(waits._Shown.busy)
    train(module, [RichProgress(1, console=Console(file=io.StringIO(), force_terminal=True))], steps=1)
    assert taken == [True]
    assert not waits._Shown.busy


def test_rich_bar_lets_go_of_the_terminal_when_the_run_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)

    def fail(step: int) -> None:
        raise RuntimeError("boom")

    module = Tiny([1.0] * 3)
    module.in_step = fail
    with pytest.raises(RuntimeError, match="boom"):
        train(module, [RichProgress(1, console=console)], steps=3)
    console.set_live(object())  # refused (or nested) while another display holds the console
    assert len(console._live_stack) == 1


def test_rich_bar_draws_at_most_ten_times_a_second(monkeypatch):
    ticks, draws = Ticks(), []
    monkeypatch.setattr(progress.Live, "update", lambda self, picture, refresh: draws.append(ticks.time))
    module = Tiny([1.0] * 90)
    module.in_step = lambda step: ticks.pass_(0.01)
    display = RichProgress(1, console=Console(file=io.StringIO(), force_terminal=True), now=ticks)
    train(module, [display], steps=90)
    assert 9 <= len(draws) <= 12


@pytest.mark.parametrize(
    ("kind", "terminal", "expected"),
    [
        ("auto", True, [RichProgress]),
        ("auto", False, [PlainProgress]),
        ("rich", False, [RichProgress]),
        ("plain", True, [PlainProgress]),
        ("none", True, []),
    ],
)
def test_kind_of_display(kind, terminal, expected, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    assert [type(display) for display in make_progress(kind, 1)] == expected


def test_unknown_kind_is_refused():
    offers = {"trainer.progress": ["auto", "rich", "plain", "none"]}
    with refused(ConfigError, key="trainer.progress", value="fancy", offers=offers):
        make_progress("fancy", 1)


def test_without_a_limit_no_total_and_no_time_left():
    progress = RunProgress(7, None, {"train/loss": float("nan")})
    assert progress.steps == "step 7"
    assert progress.details() == "loss nan"


def test_duration():
    assert [duration(s) for s in (0, 61.4, 36061, -3)] == ["0:00:00", "0:01:01", "10:01:01", "0:00:00"]
