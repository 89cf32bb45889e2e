"""`megarl watch`: a run that is followed from start to Ctrl-C, and what a wrong command is answered."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from megarl import cli
from megarl.completion import completed
from megarl.run.csv_logger import MetricsFile
from tests.report.made_up import made_up, write_run
from tests.test_cli import ROOT, imported

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run, one that has not logged yet, and a folder that is none."""
    write_run(tmp_path / "runs" / "one", made_up(5))
    write_run(tmp_path / "early", made_up(0, rows=[]))
    (tmp_path / "early" / "metrics.csv").unlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def watch(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `megarl watch WORDS`: (exit code, stdout, stderr)."""

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megarl"])
        with pytest.raises(SystemExit) as ended:
            cli.main(["watch", *words])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return called


@pytest.mark.parametrize("run", ["runs/one", "early"])
def test_a_run_is_followed_until_ctrl_c(folder: Path, run: str) -> None:
    """In its own process, in which nothing heavy is imported. A browser listens when it ends."""
    program = (
        "import sys, atexit; sys.argv = ['megarl', *sys.argv[1:]]\n"
        "atexit.register(lambda: print(*({'torch', 'lightning', 'hydra', 'omegaconf'} & sys.modules.keys())))\n"
        "from megarl.cli import main; main()"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("SSH_CONNECTION", None)
    watching = subprocess.Popen(
        [sys.executable, "-c", program, "watch", run, "port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert watching.stdout is not None
    said = watching.stdout.readline()
    address, _, about = said.partition(" follows ")
    assert about == f"{run}; Ctrl-C ends it\n"
    port, _, path = address.removeprefix("http://127.0.0.1:").partition("/")
    with closing(http.client.HTTPConnection("localhost", int(port), timeout=30)) as connection:
        connection.request("GET", f"/{path}")
        entered = connection.getresponse()
        entered.read()
        connection.request("GET", "/events", headers={"Cookie": entered.headers["Set-Cookie"].partition(";")[0]})
        answer = connection.getresponse()
        MetricsFile(folder / run / "metrics.csv").log_metrics({"rollout/score": 0.625}, 6)
        while b"phase 6: rollout/score 0.625" not in (line := answer.readline()):
            assert line
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=30)
        while answer.readline():
            pass
    assert (watching.returncode, out, err) == (130, "\n", "interrupted\n")


WRONG = [
    ([], "RUN", "megarl watch runs/demo"),
    (["runs/ona"], "RUN", "did you mean runs/one?"),
    (["empty"], "RUN", "no metrics.csv"),
    (["runs"], "RUN", "megarl watch runs/one"),
    (["runs/one/metrics.csv"], "RUN", "name its folder, runs/one"),
    (["runs/one", "early"], "RUN", "megarl report compares several"),
    (["runs/one", "port=http"], "port", "port=8899"),
    (["runs/one", "port=65536"], "port", "up to 65535"),
    (["runs/one", "port=-1"], "port", "port=8899"),
    (["runs/one", "port=\u0663"], "port", "port=8899"),
    (["runs/one", "open=yes"], "open", "choose true"),
    (["runs/one", "prot=1"], "prot", "did you mean port=?"),
    (["runs/one", "host=0.0.0.0"], "host", "port= and open="),
    (["run=runs/one"], "run", "write runs/one alone"),
    (["--port", "1", "runs/one"], "--port", "[port=8899]"),
]


@pytest.mark.parametrize(("words", "key", "remedy"), WRONG, ids=[" ".join(words) or "nothing" for words, _, _ in WRONG])
def test_a_wrong_command_is_answered_in_one_line(watch: Call, words: list[str], key: str, remedy: str) -> None:
    code, out, err = watch(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert key in err
    assert remedy in err


def test_a_port_that_is_used_is_answered_in_one_line(watch: Call) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        code, out, err = watch("runs/one", f"port={port}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"port={port} is used by another program" in err
    assert "port=0" in err


def test_a_refusal_imports_nothing_heavy(folder: Path) -> None:
    assert imported(["watch", "runs/ona"], folder) == (2, set())


def test_runs_and_settings_are_completed(folder: Path) -> None:
    assert completed("megarl watch ") == ["open=true", "port=", "runs/one"]
    assert "watch" in completed("megarl wat")
