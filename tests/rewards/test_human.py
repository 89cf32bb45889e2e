"""A person scores responses in a terminal, here a pseudo-terminal."""

import os
import select
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl.errors import RewardError
from megarl.rewards import human, process
from megarl.rewards.client import RewardWorker


def type_in(master: int, *lines: str) -> None:
    for line in lines:
        os.write(master, f"{line}\n".encode())


def test_what_is_typed_is_the_score_and_anything_else_is_asked_again() -> None:
    master, slave = os.openpty()
    type_in(master, "0.5", "", "good", "nan", "7", "-1", "s")
    found = human.ask(
        ["p"] * 3, ["one", "two", "\x1b[2Jthree"], lowest=-1, highest=1, terminal=os.ttyname(slave), extra=["x"]
    )
    assert found == [0.5, -1.0, None]
    shown = ""
    while shown.count("to skip") < 7 and select.select([master], [], [], 10)[0]:  # a terminal gives it in parts
        shown += os.read(master, 10_000).decode()
    assert "\x1b" not in shown
    assert "(-1 to 1)" in shown
    assert shown.count("to skip") == 7


def test_a_run_without_a_terminal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(human.TERMINAL, raising=False)
    with pytest.raises(RuntimeError, match=r"reward\.options\.terminal"):
        human.ask(["p"], ["one"])


def test_a_terminal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent" / "tty")
    with pytest.raises(RuntimeError, match=r"absent.*reward\.options\.terminal"):
        human.ask(["p"], ["one"], terminal=absent)


def test_a_terminal_without_a_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(descriptor: int) -> str:
        raise OSError(19, "No such device")

    monkeypatch.delenv(human.TERMINAL, raising=False)
    monkeypatch.setattr(os, "ttyname", nameless)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, fileno=lambda: 0))
    assert human.TERMINAL not in process.worker_environment()
    worker = RewardWorker("megarl.rewards.human:ask", ("bytes", None), timeout_s=60, retries=0)
    with worker, pytest.raises(RewardError) as found:
        worker.score(["pa"], ["p"], ["a"], {})
    assert "no terminal" in str(found.value)
    assert "\n" not in str(found.value)


def test_the_process_of_the_function_asks_in_the_terminal_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    monkeypatch.setenv(human.TERMINAL, os.ttyname(slave))
    typing = threading.Thread(target=type_in, args=(master, "1", "2.5"))
    typing.start()
    with RewardWorker("megarl.rewards.human:ask", ("bytes", None), timeout_s=60, retries=0, on_error="drop") as worker:
        scores = worker.score(["pa", "pb"], ["p", "p"], ["a", "b"], {})
    typing.join()
    assert scores.values == [1.0, 2.5]
