"""Reward servers under load, and a whole run whose servers are killed one after the other."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megarl.checkpoint import find, verify
from tests.e2e.runs import run_preference
from tests.e2e.test_serve_reward import Server, serving
from tests.e2e.test_train_rm import PHASES, scores_in_process, text, utility, write
from tests.serving.standins import ask, question
from tests.worlds import Worlds

REQUESTS, CLIENTS = 1000, 32
TIMEOUT_S, RETRIES, GRACE_S = 10.0, 2, 20.0
PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def model(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small reward model."""
    draw = random.Random(7)

    def pairs() -> dict[str, Any]:
        several = [text(draw, draw.random(), draw.randint(3, 24)) for _ in range(3)]
        return {"prompt": text(draw, 0.4, 5), "responses": several, "scores": [utility(one) for one in several]}

    data, run_dir = write(tmp_path_factory.mktemp("data"), pairs), tmp_path_factory.mktemp("rm")
    worlds.run(1, run_preference, run_dir, "rm", data, "trainer.max_steps=6")
    return run_dir


@pytest.mark.gate
@pytest.mark.timeout(1800)
def test_a_thousand_requests_at_once_get_the_scores_of_their_texts(model: Path, worlds: Worlds, tmp_path: Path) -> None:
    draw = random.Random(11)
    asked = [
        [(text(draw, 0.4, draw.randint(1, 9)), text(draw, 0.5, draw.randint(1, 24))) for _ in range(draw.randint(1, 8))]
        for _ in range(REQUESTS)
    ]
    records = [{"prompt": prompt, "response": response} for one in asked for prompt, response in one]
    (scores,) = worlds.run(1, scores_in_process, model / "checkpoints", 1, 1, records, None)
    wanted = iter(scores)
    with serving(model) as server:
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = list(pool.map(lambda one: ask(server.port, question(*zip(*one, strict=True)), timeout=300), asked))
        for one, (status, answer) in zip(asked, found, strict=True):
            assert status == 200
            assert answer["scores"] == pytest.approx([next(wanted) for _ in one], rel=0, abs=1e-6)
        counts = ask(server.port, method="GET", path="/metrics")[1]
        assert f"megarl_texts_total {len(records)}\n" in counts
        assert f'megarl_requests_total{{path="/score",status="200"}} {REQUESTS}\n' in counts
        assert server.end() == 0


def kill(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


@pytest.mark.gate
@pytest.mark.timeout(1800)
def test_a_run_survives_the_death_of_one_server_and_ends_in_time_when_both_are_dead(
    model: Path, tmp_path: Path
) -> None:
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"prompt": letter * 3}) + "\n" for letter in "abcdefgh"))
    checkpoints = run / "checkpoints"

    def wait_for(count: int) -> None:
        """Wait until the run has saved `count` checkpoints more than it had."""
        last, deadline = find(checkpoints)[-1:], time.monotonic() + PATIENCE_S
        for _ in range(count):
            while find(checkpoints)[-1:] == last:
                assert running.poll() is None, console.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            last = find(checkpoints)[-1:]

    with serving(model) as one, serving(model) as other:
        settings = [
            *(f"data.train=[{prompts}]", f"reward.url=[{one.url},{other.url}]", f"run.dir={run}"),
            *("reward.calls.batch_size=2", f"reward.calls.timeout={TIMEOUT_S}", f"reward.calls.retries={RETRIES}"),
            *("trainer.max_phases=100000", "checkpoint.every=1", "trainer.devices=2"),
        ]
        console = tmp_path / "console.txt"
        with console.open("wb") as log:
            running = subprocess.Popen(
                [sys.executable, "-m", "megarl.train_ppo", *PHASES, *settings],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(2)
            kill(one)
            wait_for(3)
            kill(other)
            killed = time.monotonic()
            code = running.wait(timeout=PATIENCE_S)
            assert time.monotonic() - killed < (RETRIES + 1) * TIMEOUT_S + GRACE_S
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
    said = console.read_text()
    assert code == 2, said[-3000:]
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(name in line for name in ("reward.url", one.url, other.url))
    assert "Traceback" not in said
    assert verify(find(checkpoints)[-1]) is None
