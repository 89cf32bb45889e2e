"""What a command leaves on the terminal: one line for what a user can mend, and nothing that steers the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.command import printable, process_number, run_command
from megarl.errors import ConfigError, NumericsError


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable("a\tb\nc \x1b[2J\x07 \x9b \u202e") == "a\tb\nc \\x1b[2J\\x07 \\x9b \\u202e"


def test_text_that_the_terminal_cannot_show_ends_nothing() -> None:
    script = "import sys; from megarl.command import run_command; run_command(lambda: print('\\u00e9 \\ud800') or 0)"
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False)
    assert (done.returncode, done.stdout) == (0, "\\xe9 \\ud800\n")


def test_text_in_any_writing_stays_as_it_is() -> None:
    text = "é prix\xa0: 5\u202f€ 日本\u3000語 👨\u200d👩 \u200c"
    assert printable(text) == text


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (NumericsError, 3)])
def test_an_error_is_one_line_and_its_exit_code(
    error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error("two\nlines with \x1b[31m")

    with pytest.raises(SystemExit) as end:
        run_command(work)
    assert end.value.code == code
    assert capsys.readouterr().err == "error: two lines with \\x1b[31m\n"


def test_the_message_of_an_error_is_one_line_that_can_be_read_whatever_value_it_repeats() -> None:
    told = str(ConfigError("model.path=one\ntwo\r\nthree\u2028four is not there"))
    assert told == "model.path=one two three four is not there"
    told = str(ConfigError(f"model.path={'x' * 100_000}: give a folder"))
    assert len(told) < 4000
    assert told.startswith("model.path=xxx")
    assert told.endswith(": give a folder")


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(work)
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_what_would_end_the_same_way_again_is_told_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        raise ConfigError("bad")

    monkeypatch.setenv("MEGARL_STATUS_FILE", str(tmp_path / "status"))
    with pytest.raises(SystemExit):
        run_command(work)
    assert (tmp_path / "status.exit").read_text() == "2"


def test_a_bug_keeps_its_traceback() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(work)


def test_an_error_that_was_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("in use")
    error.said = True

    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(work)
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"RANK": "0", "SLURM_PROCID": "5"}, 0),  # a torchrun in each of several tasks
        ({"SLURM_PROCID": "2"}, 2),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 1),  # trainer.devices=2 in a batch script
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, 1),
        ({"RANK": ""}, 0),
    ],
)
def test_a_process_knows_its_number_before_there_is_a_group(environ: dict[str, str], number: int) -> None:
    assert process_number(environ) == number
