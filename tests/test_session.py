"""`megarl.Session`: its loop computes what `train_ppo` computes, in every layout, and goes on from what it saved."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import megarl
from megarl import training
from megarl.errors import ConfigError, DataError, UnavailableError
from megarl.parallel.rows import Rows
from megarl.run.workers import Workers
from tests.e2e.runs import PAIRS, WALKS, composed, launched
from tests.refusals import refused
from tests.worlds import Worlds

PHASES = 2
MEASURED = ("rollout/score", "rollout/kl", "policy/loss", "value/loss", "train/grad_norm", "train/lr")
NORM = "train/grad_norm/policy"


def settings(run_dir: Path, *more: str) -> list[str]:
    return [*WALKS, f"run.dir={run_dir}", f"trainer.max_phases={PHASES}", "trainer.eval_every=null", *more]


def trained(run_dir: Path) -> list[dict[str, float]]:
    """What `train_ppo` logs."""
    with launched():
        assert training.train("ppo", composed("ppo", settings(run_dir))) == 0
    if not (run_dir / "metrics.csv").exists():
        return []
    with (run_dir / "metrics.csv").open() as lines:
        return [{name: float(row[name]) for name in MEASURED} for row in csv.DictReader(lines) if row["policy/loss"]]


def stepped(run_dir: Path, *more: str, processes: int | None = None) -> list[dict[str, float]]:
    """The same loop, step by step."""
    found = []
    with megarl.Session(megarl.default_config("ppo", *settings(run_dir, *more)), processes=processes) as session:
        for _ in range(PHASES):
            found.append(phase(session))
    return found


def phase(session: megarl.Session) -> dict[str, float]:
    responses = session.sample(session.prompts())
    rows = session.advantages(session.forward(responses), session.score(responses))
    steps = []
    for minibatch in session.minibatches(rows):
        losses = session.forward_backward(minibatch)
        steps.append({**losses, **session.optim_step()})
    means = {name: sum(one[name] for one in steps) / len(steps) for name in ("policy/loss", "value/loss", NORM)}
    return {**session.end_phase(), **means, "train/grad_norm": means[NORM], "train/lr": steps[0]["train/lr"]}


def in_a_world(work: Callable[..., Any], *arguments: Any) -> Any:
    with launched():
        return work(*arguments)


def close(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    for name in MEASURED:
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


def test_the_loop_computes_what_train_ppo_computes_in_every_layout(worlds: Worlds, tmp_path: Path) -> None:
    (expected,) = worlds.run(1, trained, tmp_path / "run")
    (alone,) = worlds.run(1, in_a_world, stepped, tmp_path / "alone")
    both = worlds.run(4, in_a_world, stepped, tmp_path / "both", "parallel.tp=2", "parallel.pp=2")
    assert len(expected) == PHASES
    for number, one in enumerate(expected):
        close(alone[number], one, 1e-6)
        for rank in both:
            close(rank[number], one, 1e-4)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[megarl.Session]:
    """A session over two processes that it started."""
    config = megarl.default_config("ppo", *settings(tmp_path_factory.mktemp("session") / "run", "parallel.tp=2"))
    with megarl.Session(config, processes=2) as opened:
        yield opened


def test_processes_that_a_session_starts_hold_one_model(session: megarl.Session) -> None:
    assert session.layout == "TP2"
    assert set(phase(session)) >= set(MEASURED)


def test_what_was_saved_is_gone_back_to(session: megarl.Session) -> None:
    saved = session.save()
    first = phase(session)
    assert phase(session) != first
    session.load(saved)
    assert phase(session) == first


def test_responses_made_elsewhere_train(session: megarl.Session) -> None:
    rows = session.forward(session.responses(["ab", "cd"], ["efg", [1, 2]]))
    assert torch.equal(rows["rollout_logprobs"] * rows.action_mask, rows["old_logprobs"] * rows.action_mask)
    assert torch.equal(session.values(rows), rows["values"])
    assert torch.equal(session.values(rows.take(torch.tensor([1])))[0], rows["values"][1])
    shaped = session.advantages(rows, [1.0, 0.0])
    session.forward_backward(shaped)
    assert session.optim_step(lr=1e-4)["train/lr"] == 1e-4


def test_a_loss_of_ones_own_is_minimised(session: megarl.Session) -> None:
    def unlikely(logprobs: torch.Tensor, rows: Rows, counts: dict[str, float]) -> Any:
        mean = (logprobs * rows.action_mask).sum() / counts["tokens"]
        return mean, {"mean": mean}

    rows = session.forward(session.sample(["ab"], 4, max_new_tokens=3))
    means = []
    for _ in range(3):
        means.append(session.forward_backward(rows, unlikely)["mean"])
        session.optim_step(lr=1e-3)
    assert means[0] > means[1] > means[2]


def test_a_phase_ends_where_an_update_is_followed_by_sampling(session: megarl.Session) -> None:
    session.end_phase()
    first, again = session.sample(["ab"], 2), session.sample(["ab"], 2)
    assert [one.prompt_id for one in (*first, *again)] == [0, 0, 1, 1]
    session.forward_backward(session.advantages(session.forward(first), [1.0, 0.0]))
    session.optim_step()
    assert session.sample(["ab"], 1)[0].prompt_id == 0


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (lambda session: session.batch(), "batch"),
        (lambda session: session.sample(["ab"], temperature=-1), "rollout.temperature"),
        (lambda session: session.sample([[]]), "prompts"),
        (lambda session: session.responses(["ab"], []), "outputs"),
        (lambda session: session.responses(["ab"], [[10**6]]), "outputs"),
        (lambda session: session.advantages(session.forward(session.sample(["ab"], 1)), []), "scores"),
        (lambda session: session.optim_step(), "forward_backward"),
        (lambda session: session.forward_backward(session.forward(session.sample(["ab"], 1))), "rows"),
        (lambda session: session.forward_backward(session.forward(session.sample(["ab"], 1)), lambda *_: 3), "loss"),
        (lambda session: session.sample(["ab"], temprature=1), "temprature"),
        (lambda session: session.advantages(session.forward(session.sample(["ab"], 1)), [math.nan]), "scores[0]"),
        (lambda session: session.load("nowhere"), "run.resume"),
    ],
)
def test_a_wrong_call_is_one_line_and_the_session_goes_on(
    session: megarl.Session, wrong: Callable[[megarl.Session], Any], key: str
) -> None:
    session.end_phase()
    with pytest.raises((ConfigError, DataError, megarl.errors.MegarlError)) as told:
        wrong(session)
    assert told.value.key == key
    assert len(session.sample(["ab"], 1)) == 1


@pytest.mark.gate
def test_a_whole_run_in_processes_of_its_own_trains_as_in_this_one(tmp_path: Path, worlds: Worlds) -> None:
    def train(run_dir: Path, processes: int | None, *more: str) -> tuple[list[dict[str, float]], int]:
        config = megarl.default_config(
            "sft", *PAIRS, f"run.dir={run_dir}", "trainer.max_steps=2", "data.eval=[]", *more
        )
        trained = megarl.train(samples=["a text", "another"], config=config, device="cpu", processes=processes)
        return trained.history, trained.settings("generate", {}).parallel.pp

    ((alone, _),) = worlds.run(1, in_a_world, train, tmp_path / "alone", None)
    two, stages = train(tmp_path / "two", 2, "parallel.pp=2")
    assert stages == 1, "what generates afterwards is this process alone"
    assert [row["train/loss"] for row in two] == pytest.approx([row["train/loss"] for row in alone], rel=1e-5)


def test_a_name_that_is_no_argument_is_answered_by_the_nearest(tmp_path: Path) -> None:
    with refused(ConfigError, key="promts", offers={"promts": ["prompts"]}):
        megarl.Session("ppo", promts=["a"])  # type: ignore[call-arg]
    with refused(ConfigError, key="rewardfn", offers={"rewardfn": ["reward_fn", "rewards"]}):
        megarl.train("tiny", rewardfn=len)  # type: ignore[call-arg]
    with refused(DataError, key="prompts", value=[]):
        megarl.train("tiny", reward_fn=len, prompts=[])
    with refused(ConfigError, key="reward_fn", value=3):
        megarl.train("tiny", reward_fn=3, prompts=["a"])  # type: ignore[arg-type]


def supervised(run_dir: Path) -> list[tuple[float, float]]:
    pairs = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 8
    config = megarl.default_config("dpo", *PAIRS, f"run.dir={run_dir}", "data.eval=[]", "trainer.eval_every=null")
    found = []
    with megarl.Session(config, pairs=pairs) as session:
        for _ in range(3):
            losses = session.forward_backward(session.batch())
            found.append((losses["loss"], session.optim_step()[NORM]))
    return found


def test_algorithms_that_learn_from_data_have_batches(worlds: Worlds, tmp_path: Path) -> None:
    ((first, *others),) = worlds.run(1, in_a_world, supervised, tmp_path / "run")
    assert first[0] == pytest.approx(0.6931, abs=1e-4)
    assert all(loss < first[0] for loss, _ in others)


def test_what_starts_processes_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ConfigError, key="processes", value=2):
        megarl.Session(megarl.default_config("ppo", *settings(tmp_path / "run")), processes=2)


def test_a_process_that_dies_ends_the_session_in_one_line(tmp_path: Path) -> None:
    def die(state: dict[str, Any]) -> None:
        if os.environ["RANK"] == "1":
            os._exit(7)
        time.sleep(60)

    before = len(psutil.Process().children())
    workers = Workers(2)
    with refused(UnavailableError, key="processes", where="process 1"):
        workers.call(die)
    with refused(UnavailableError, key="processes"):
        workers.call(die)
    assert len(psutil.Process().children()) == before


def test_a_process_that_fails_alone_does_not_leave_the_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(state: dict[str, Any]) -> None:
        if os.environ["RANK"] == "0":
            raise DataError("data.train has a broken record", key="data.train")
        time.sleep(60)

    monkeypatch.setattr("megarl.run.workers.PATIENCE_S", 1.0)
    with refused(DataError, key="data.train"):
        Workers(2).call(fail)
