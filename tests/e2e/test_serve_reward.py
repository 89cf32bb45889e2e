"""A reward model as a service: scores are those in process, a run learns from it, and a signal ends it."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megarl import serve_reward
from megarl.config.compose import run
from megarl.serve_reward import serve
from tests.e2e.runs import metrics, run_preference
from tests.e2e.test_train_rm import run_with_model, scores_in_process, text, utility, write
from tests.gated import gated
from tests.programs import Program
from tests.refusals import assert_command_refused
from tests.serving.standins import ask, question
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": ["trainer.devices=2", "parallel.tp=2", "serve.batch_size=4"],
    "TP2xPP2": ["trainer.devices=4", "parallel.tp=2", "parallel.pp=2", "serve.batch_size=4"],
}


@pytest.fixture(scope="module")
def model(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small reward model, with `scores.jsonl` of its last evaluation."""
    random = Random(7)

    def pairs() -> dict[str, Any]:
        several = [text(random, random.random(), random.randint(3, 24)) for _ in range(3)]
        return {"prompt": text(random, 0.4, 5), "responses": several, "scores": [utility(one) for one in several]}

    data, run_dir = write(tmp_path_factory.mktemp("data"), pairs), tmp_path_factory.mktemp("rm")
    worlds.run(1, run_preference, run_dir, "rm", data, "rm.normalise=true", "trainer.max_steps=6")
    return run_dir


class Server:
    """A running `python -m megarl.serve_reward`."""

    def __init__(self, model: Path, *overrides: str) -> None:
        self.process = Program("megarl.serve_reward", f"model.path={model}", "serve.port=0", *overrides)
        line = self.process.first_line()
        assert " at http://127.0.0.1:" in line, self.process.errors()
        self.port = int(line.rpartition(":")[2])
        self.fingerprint = line.partition("(")[2].partition(")")[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(model: Path, *overrides: str) -> Iterator[Server]:
    server = Server(model, *overrides)
    try:
        yield server
    finally:
        server.process.end()


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Server]:
    """A server of one process. The last test that has it ends it."""
    with serving(model) as server:
        yield server


def check_answers(server: Server, model: Path, worlds: Worlds, relative: float) -> None:
    """Scores of the model's own evaluation are those in process, and what is too long is refused."""
    records = [json.loads(line) for line in (model / "scores.jsonl").read_text().splitlines()]
    (wanted,) = worlds.run(1, scores_in_process, model / "checkpoints", 1, 1, records, None)
    asked = question([one["prompt"] for one in records], [one["response"] for one in records])
    status, answer = ask(server.port, asked)
    assert status == 200
    assert answer["scores"] == pytest.approx(wanted, rel=relative, abs=1e-6)
    assert answer["model"] == server.fingerprint
    too_long = ask(server.port, question(["a"], ["b" * 100_000]))
    assert (too_long[0], too_long[1]["where"]) == (422, "prompts[0]")
    assert "model.path" in too_long[1]["error"]


def check_end(server: Server, number: int) -> None:
    assert server.end(number) == 0, server.process.errors()
    assert "Traceback" not in server.process.errors()


def test_scores_over_http_are_those_in_process(alone: Server, model: Path, worlds: Worlds) -> None:
    check_answers(alone, model, worlds, 0)


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2xPP2"]))
def test_every_layout_serves_the_same_and_a_signal_ends_every_process(
    layout: str, alone: Server, model: Path, worlds: Worlds
) -> None:
    with serving(model, *LAYOUTS[layout]) as server:
        check_answers(server, model, worlds, 1e-5)
        assert server.fingerprint == alone.fingerprint
        check_end(server, signal.SIGINT)


@pytest.mark.gate
def test_an_idle_server_outlives_the_time_out_of_its_processes(model: Path) -> None:
    layout = ["trainer.devices=2", "parallel.timeout_s=8"]
    with serving(model, *layout) as server:
        time.sleep(14)
        assert ask(server.port, question(["a"], ["b"]))[0] == 200
        assert server.end() == 0, server.process.errors()


def test_ppo_learns_from_a_server_as_from_the_model_in_process(
    alone: Server, model: Path, worlds: Worlds, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": letter * 3}) + "\n" for letter in "abcdefgh"))
    # All that this policy can write is text, so that both read the same.
    settings = ["tokenizer.kind=characters", "tokenizer.path=abcdefghijklm", "trainer.max_phases=2"]
    worlds.run(1, run_with_model, tmp_path / "within", prompts, model, *settings)
    served = ["reward.model=null", f"reward.url=[{alone.url}]", "reward.calls.batch_size=3", *settings]
    worlds.run(2, run_with_model, tmp_path / "served", prompts, model, *served)
    ours, theirs = (metrics(tmp_path / name, "rollout/score")[0] for name in ("served", "within"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    journal = list((tmp_path / "served" / "journal").glob("reward-*.jsonl"))
    entries = [json.loads(line) for path in journal for line in path.read_text().splitlines()]
    assert {entry["by"] for entry in entries} == {alone.fingerprint}


def test_a_signal_ends_it(alone: Server) -> None:
    check_end(alone, signal.SIGTERM)


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which the command refuses its arguments."""
    with pytest.raises(SystemExit) as ended:
        run("serve_reward", argv, serve)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_cannot_be_served_is_refused_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"model.path={model}"
    assert "model.path" in refusal([], capsys)
    assert "serve.host" in refusal([named, "serve.host=no.such.host.invalid"], capsys)
    assert "serve.host" in refusal([named, "serve.host=192.0.2.1"], capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refusal([named, f"serve.port={taken.getsockname()[1]}"], capsys)
    assert "serve.port" in line
    for content in (None, "", "two words"):
        if content is not None:
            (tmp_path / "token").write_text(content)
        assert "serve.token_file" in refusal([named, f"serve.token_file={tmp_path}/token"], capsys)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "model.path" in refusal([f"model.path={tmp_path}/policy"], capsys)
    find = importlib.util.find_spec
    for package in serve_reward.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, gone=package: None if name == gone else find(name))
            line = refusal([named], capsys)
        assert package in line
        assert "megarl[serve]" in line


def test_a_checkpoint_without_a_score_head_is_refused_before_anything_is_loaded(worlds: Worlds, tmp_path: Path) -> None:
    data = write(tmp_path / "data", lambda: {"prompt": "p", "chosen": "a", "rejected": "b"})
    worlds.run(1, run_preference, tmp_path / "policy", "orpo", data, "trainer.max_steps=1", "trainer.eval_every=null")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megarl.serve_reward", f"model.path={tmp_path / 'policy'}"],
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "fastapi", "uvicorn"}
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert_command_refused(done, "model.path", "policy")
