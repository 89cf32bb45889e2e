"""The command of a reward server: what fails, fails before it is announced, and a signal always ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl import serve_reward
from megarl.config.compose import compose
from megarl.config.rules import check
from megarl.config.serve import ServeConfig
from megarl.errors import ConfigError, NumericsError
from megarl.parallel.processes import run_in_processes
from tests.refusals import refused
from tests.serving.standins import ALONE, LONGEST, BytesReader, HashScorer, ask

GRID: Any = SimpleNamespace(**vars(ALONE), layout=SimpleNamespace(dp=2))


class FullScorer(HashScorer):
    """A scorer with what the command reads of one. It remembers the lengths of its texts."""

    fingerprint = "m1"

    def __init__(self) -> None:
        super().__init__()
        self.reader: Any = BytesReader()
        self.reader.longest = LONGEST
        self.lengths: list[set[int]] = []

    def score_tokens(self, sequences: Any) -> torch.Tensor:
        self.lengths.append({len(one) for one in sequences})
        return super().score_tokens(sequences)


def start(scorer: Any, *settings: str) -> list[int]:
    """Serve until the port is announced. Returns the ports."""
    ports: list[int] = []
    config: ServeConfig = compose("serve_reward", ["model.path=x", "serve.port=0", *settings])[0]
    stop = serve_reward._Stop()

    def ready(port: int) -> None:
        ports.append(port)
        assert stop.close is not None
        assert ask(port, method="GET", path="/health")[0] == 200
        stop.close()

    serve_reward._serve(config, GRID, scorer, stop, ready)
    return ports


def test_a_full_batch_is_scored_before_the_port_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    scorer = FullScorer()
    (port,) = start(scorer, "serve.batch_size=3")
    assert (scorer.batches, scorer.lengths) == ([6], [{LONGEST}]), "3 texts for each of 2 replicas"
    assert f":{port}" in capsys.readouterr().out
    scorer = FullScorer()
    start(scorer, "serve.batch_size=3", "serve.max_tokens=17")
    assert scorer.lengths == [{17}]


def test_a_batch_without_memory_or_with_wrong_scores_ends_the_command_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scorer = FullScorer()
    scorer.problem = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        start(scorer)
    scorer = FullScorer()
    scorer.value = float("nan")
    with refused(NumericsError, key="model.path", names=("trainer.precision",)):
        start(scorer)
    assert capsys.readouterr().out == ""


def test_the_largest_request_must_fit_into_all() -> None:
    offers = {"serve.max_open_bytes": [4096], "serve.max_request_bytes": [2048]}
    with refused(ConfigError, key="serve.max_open_bytes", value=2048, offers=offers):
        check(
            compose("serve_reward", ["model.path=x", "serve.max_request_bytes=4096", "serve.max_open_bytes=2048"])[0], 1
        )


class Sleeping:
    """A process with the methods of those of multiprocessing."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "60"])

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.terminate()


def test_a_signal_before_all_processes_have_started_reaches_them() -> None:
    with serve_reward._passed_on() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        later: Any = [Sleeping(), Sleeping()]
        signals.take(later)
        assert [one.process.wait(timeout=10) for one in later] == [-signal.SIGTERM] * 2
    assert signals.arrived


def _sleep(config: Any) -> None:
    time.sleep(60)


def test_a_signal_while_processes_start_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_reward, "work", _sleep)
    monkeypatch.setattr(serve_reward, "require_score_head", lambda path, key: None)
    monkeypatch.setattr("megarl.parallel.processes.run_in_processes", run_with_signal)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config: ServeConfig = compose("serve_reward", ["model.path=x", "serve.port=0", "trainer.devices=2"])[0]
    began = time.monotonic()
    assert serve_reward.serve(config) == 130
    assert time.monotonic() - began < 40


def run_with_signal(world: int, work: Any, config: Any, **options: Any) -> int:
    """Run processes of a command that gets a signal just before they start."""
    os.kill(os.getpid(), signal.SIGTERM)
    return run_in_processes(world, work, config, **options)


def test_a_port_in_use_is_refused() -> None:
    config: ServeConfig = compose("serve_reward", ["model.path=x"])[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config.serve.port = taken.getsockname()[1]
        with refused(ConfigError, key="serve.port", value=config.serve.port, offers={"serve.port": [0]}):
            serve_reward.bind(config.serve)
