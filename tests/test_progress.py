"""Bars of waits: on whose terminal they appear, when, and that nothing is left of them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from megarl import logging as megarl_logging
from megarl import progress
from megarl.progress import choose_display, shows_bars, terminal_taken, waiting
from tests.callbacks.tiny import Ticks


class Screen(io.StringIO):
    """A stderr that says whether it is a terminal, from `on` on: pytest sets its own before every test."""

    terminal = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.monkeypatch = monkeypatch

    def on(self) -> None:
        self.monkeypatch.setattr(sys, "stderr", self)

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """The time that bars see."""
    ticks = Ticks()
    monkeypatch.setattr(progress.time, "monotonic", ticks)
    return ticks


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """The terminal of the first process."""
    screen = Screen(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield screen
    choose_display("auto")
    megarl_logging.enable_progress_bar()


def wait(ticks: Ticks, seconds: float, parts: int = 10, **settings: float) -> None:
    with waiting("loading", parts, **settings) as part_done:
        for _ in range(parts):
            ticks.pass_(seconds / parts)
            part_done()


def test_a_long_wait_shows_a_bar_which_is_removed_at_the_end(screen: Screen, ticks: Ticks) -> None:
    screen.on()
    wait(ticks, 20)
    assert "loading" in screen.getvalue()
    assert "9/10" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is cleared


def test_a_short_wait_shows_nothing(screen: Screen, ticks: Ticks) -> None:
    screen.on()
    wait(ticks, 0.9)
    assert screen.getvalue() == ""


def test_a_wait_whose_first_part_may_be_long_is_shown_at_once(screen: Screen, ticks: Ticks) -> None:
    screen.on()
    with waiting("importing", after_s=0):
        assert "importing ..." in screen.getvalue()


def test_a_bar_is_drawn_at_most_ten_times_a_second(screen: Screen, ticks: Ticks) -> None:
    screen.on()
    wait(ticks, 3, parts=3000)
    assert 18 <= screen.getvalue().count("/3000") <= 24


@pytest.mark.parametrize("why", ["pipe", "dumb", "second rank", "plain", "none", "disabled", "another display"])
def test_no_bar_where_nobody_wants_one(why: str, screen: Screen, ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.on()
    if why == "pipe":
        screen.terminal = False
    elif why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif why == "second rank":
        monkeypatch.setenv("RANK", "1")
    elif why == "disabled":
        megarl_logging.disable_progress_bar()
    elif why != "another display":
        choose_display(why)
    if why == "another display":
        with terminal_taken():
            wait(ticks, 20, after_s=0)
    else:
        wait(ticks, 20, after_s=0)
    assert screen.getvalue() == ""


def test_waits_inside_a_wait_do_not_draw_over_it(screen: Screen, ticks: Ticks) -> None:
    screen.on()
    with waiting("evaluating", 1, after_s=0):
        wait(ticks, 20)
    assert "loading" not in screen.getvalue()
    wait(ticks, 20)
    assert "loading" in screen.getvalue()


def test_an_error_leaves_the_terminal_clear(screen: Screen, ticks: Ticks) -> None:
    screen.on()
    with pytest.raises(OSError, match="gone"), waiting("loading", 1, after_s=0):
        raise OSError("gone")
    assert screen.getvalue().endswith("\x1b[2K")
    assert sys.stderr is screen
    with waiting("again", after_s=0):
        assert "again" in screen.getvalue()


def test_rich_is_asked_for_even_without_a_terminal() -> None:
    assert shows_bars("rich")
    assert not shows_bars("plain")
