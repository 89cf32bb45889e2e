"""A policy that is trained against one reward model in each of three ways: in process, over HTTP, in the worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megarl.rollout.noise import TRAINING
from megarl.rollout.requests import Rollout
from megarl.rollout.stored import load, phase_file
from megarl.tokenizers import ByteTokenizer
from tests.e2e.runs import metrics
from tests.e2e.test_serve_reward import serving

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]
INSTRUCT = Path(__file__).parents[2] / "examples" / "instruct"
RUNS = Path("runs/instruct")
UTILITY = "eval/utility"  # of the whole answers, which the policy never sees


def step(name: str, folder: Path, *settings: str) -> None:
    """Run a step of the example in a folder."""
    done = subprocess.run(
        ["bash", INSTRUCT / f"{name}.sh", "trainer.progress=none", *settings],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that follows instructions, and a reward model, also as a folder of transformers."""
    made = tmp_path_factory.mktemp("ways")
    step("sft", made)
    step("rm", made, f"export.hf={made / 'exported'}")
    return made


@pytest.fixture(scope="module")
def urls(folder: Path) -> Iterator[list[str]]:
    """Two servers with the reward model."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(folder / RUNS / "rm")).url for _ in range(2)]


def is_text(rollout: Rollout) -> bool:
    """Whether a response of a policy of bytes is text."""
    tokenizer, response = ByteTokenizer(), rollout.response_without_eos
    return tokenizer.encode(tokenizer.decode(response)) == response


def test_each_way_raises_the_utility_and_gives_equal_texts_equal_scores(folder: Path, urls: list[str]) -> None:
    ways = {
        "process": [f"rollout.dump={folder / 'dump'}"],
        "servers": ["reward.model=null", f"reward.url=[{','.join(urls)}]"],
        "worker": [
            *("reward.model=null", "reward.fn=megarl.rewards.classifier:score"),
            f"reward.options.path={folder / 'exported'}",
        ],
    }
    first = {}
    for way, settings in ways.items():
        step("ppo", folder, f"run.dir={RUNS / way}", *settings)
        found = json.loads((folder / RUNS / way / "summary.json").read_text())["metrics"][UTILITY]
        print(f"{way}: utility {found['first']:.3f} to {found['last']:.3f}")  # noqa: T201 - for the log of the gate
        assert found["last"] - found["first"] > (1 - found["first"]) / 2, way
        first[way] = metrics(folder / RUNS / way, "rollout/score")[0]
    # Later phases have other responses: a difference in the last digits of a score grows from update to update.
    assert first["worker"] == pytest.approx(first["servers"], rel=1e-5, abs=1e-6)
    rollouts = load(phase_file(folder / "dump", TRAINING, 0))
    other = sum(not is_text(rollout) for rollout in rollouts)  # only in process is it read as it was generated
    print(f"{other} of {len(rollouts)} responses are not text")  # noqa: T201
    assert other <= 3
    assert first["process"] == pytest.approx(first["servers"], rel=1e-5, abs=1e-6 + other / len(rollouts))
