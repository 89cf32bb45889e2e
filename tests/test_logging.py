"""Who hears what: the console of rank 0, the consoles of others, and the file of each process."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import megarl
from megarl import logging as ours
from megarl.callbacks.progress import PlainProgress, RichProgress, make_progress
from megarl.errors import ConfigError
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
    ours._Choices.verbosity, ours._Choices.rank, ours._Choices.debug = None, 0, False
    ours.reset_format()
    ours.enable_progress_bar()


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


def test_verbosity_decides_what_the_console_shows_before_and_during_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megarl.logging.set_verbosity(megarl.logging.ERROR)
    setup(tmp_path, rank=0, debug=False)
    speak()
    assert capsys.readouterr().err.splitlines() == ["our error"]
    ours.set_verbosity("debug")
    assert ours.get_verbosity() == logging.DEBUG
    speak()
    assert capsys.readouterr().err.splitlines() == ["our detail", "our info", "foreign warning", "our error"]
    kept = (tmp_path / "logs" / "rank-0000.log").read_text(encoding="utf-8")
    assert kept.count("our info") == 2  # whatever the console shows


def test_verbosity_of_other_ranks_never_falls_below_errors(capsys: pytest.CaptureFixture[str]) -> None:
    ours.set_verbosity("debug")
    setup(None, rank=2, debug=False)
    speak()
    assert capsys.readouterr().err == "[rank 2] our error\n"


def test_the_environment_names_a_level_unless_the_script_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGARL_VERBOSITY", "WARNING")
    setup(None, rank=0, debug=False)
    speak()
    assert capsys.readouterr().err.splitlines() == ["foreign warning", "our error"]
    ours.set_verbosity("info")
    speak()
    assert "our info" in capsys.readouterr().err


def test_debug_shows_all_whatever_the_verbosity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGARL_VERBOSITY", "error")
    setup(None, rank=0, debug=True)
    ours.enable_explicit_format()
    speak()
    assert "our detail" in capsys.readouterr().err


def test_a_level_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        ours.set_verbosity("loud")
    assert (refused.value.key, refused.value.value) == ("level", "loud")
    assert "debug" in refused.value.offers["level"]
    monkeypatch.setenv("MEGARL_VERBOSITY", "loud")
    with pytest.raises(ConfigError) as refused:
        setup(None, rank=0, debug=False)
    assert refused.value.key == "MEGARL_VERBOSITY"


def test_the_explicit_format_says_when_where_and_on_which_rank(capsys: pytest.CaptureFixture[str]) -> None:
    ours.enable_explicit_format()
    setup(None, rank=1, debug=False)
    speak()
    line = capsys.readouterr().err.strip()
    assert line.startswith("[2")
    assert " ERROR test_logging.py:" in line
    assert ":speak rank 1] our error" in line
    ours.reset_format()
    speak()
    assert capsys.readouterr().err == "[rank 1] our error\n"


def test_disabled_progress_bars_become_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_progress("auto", 1)[0], RichProgress)
    ours.disable_progress_bar()
    assert not ours.is_progress_bar_enabled()
    assert isinstance(make_progress("auto", 1)[0], PlainProgress)
    assert isinstance(make_progress("rich", 1)[0], RichProgress)  # what a key demands
