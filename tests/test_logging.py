"""Who hears what: the console of rank 0, the consoles of others, and the file of each process."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.logging import get_logger, info_once, setup, warn_once


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the root logger as it was."""
    root = logging.getLogger()
    before = (root.level, logging.getLogger("megarl").level)
    yield
    for handler in [h for h in root.handlers if getattr(h, "megarl", False)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[0])
    logging.getLogger("megarl").setLevel(before[1])
    logging.captureWarnings(False)


def speak() -> None:
    ours, foreign = get_logger("megarl.modules.sft"), logging.getLogger("megatron.core")
    ours.debug("our detail")
    ours.info("our info")
    foreign.info("foreign info")
    foreign.warning("foreign warning")
    ours.error("our error")


def test_rank_0_shows_our_messages_and_foreign_warnings_and_the_file_keeps_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup(tmp_path, rank=0, debug=False)
    speak()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["our info", "foreign warning", "our error"]
    kept = (tmp_path / "logs" / "rank-0000.log").read_text(encoding="utf-8").splitlines()
    assert [line.rpartition(": ")[2] for line in kept] == [
        "our info",
        "foreign info",
        "foreign warning",
        "our error",
    ]
    assert "INFO megatron.core: foreign info" in kept[1]


def test_other_ranks_show_errors_only_with_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup(tmp_path, rank=3, debug=False)
    speak()
    assert capsys.readouterr().err == "[rank 3] our error\n"
    assert "our info" in (tmp_path / "logs" / "rank-0003.log").read_text(encoding="utf-8")


def test_debug_adds_our_detail_but_not_that_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    setup(None, rank=0, debug=True)
    speak()
    logging.getLogger("torch").debug("torch detail")
    assert capsys.readouterr().err.splitlines() == ["our detail", "our info", "foreign warning", "our error"]


def test_setting_up_again_says_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup(None, rank=0, debug=False)
    setup(tmp_path, rank=0, debug=False)
    get_logger("megarl").info("once")
    assert capsys.readouterr().err == "once\n"


def test_handlers_a_library_brought_along_are_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("lightning.pytorch")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    library.disabled = False  # whatever other tests' libraries did to it
    library.setLevel(logging.INFO)
    setup(tmp_path, rank=0, debug=False)
    library.warning("from lightning")
    assert capsys.readouterr().err == "from lightning\n"
    assert "from lightning" in (tmp_path / "logs" / "rank-0000.log").read_text(encoding="utf-8")


def test_a_warning_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup(None, rank=0, debug=False)
    for _ in range(3):
        warn_once(get_logger("megarl.test"), "said once")
    warn_once(get_logger("megarl.test"), "another")
    assert capsys.readouterr().err == "said once\nanother\n"


def test_a_message_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup(None, rank=0, debug=False)
    for _ in range(3):
        info_once(get_logger("megarl.test"), "100 % once")
    assert capsys.readouterr().err == "100 % once\n"


def test_python_warnings_reach_the_file(tmp_path: Path) -> None:
    setup(tmp_path, rank=1, debug=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old option", stacklevel=1)
    assert "old option" in (tmp_path / "logs" / "rank-0001.log").read_text(encoding="utf-8")


def test_console_lines_follow_a_replaced_stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup(None, rank=0, debug=False)
    with (tmp_path / "captured").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        get_logger("megarl").info("above the bar")
    assert (tmp_path / "captured").read_text(encoding="utf-8") == "above the bar\n"
