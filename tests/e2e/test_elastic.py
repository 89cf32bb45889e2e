"""Runs that are killed and come back with other numbers of processes: the numbers are those of an unbroken run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.errors import ConfigError
from megarl.training import module_of
from tests.e2e.runs import final_tensors, metrics, run_ppo, run_sft, starts
from tests.gated import gated
from tests.refusals import assert_refusal
from tests.worlds import Worlds

Run = Callable[..., None]
RUNS: dict[str, tuple[Run, list[str], tuple[str, ...]]] = {
    "sft": (
        run_sft,
        ["trainer.max_steps=12", "checkpoint.every=3", "trainer.global_batch_size=12"],
        ("train/loss", "train/grad_norm"),
    ),
    "ppo": (
        run_ppo,
        ["trainer.max_phases=6", "checkpoint.every=1", "model.num_layers=4", "optim.lr=1e-3"],
        ("rollout/score", "train/loss", "value/loss"),
    ),
}
ELASTIC = ["parallel.tp=2", "launch.elastic=true", "checkpoint.save_last=true"]


def killed(run: Run, algorithm: str, at: int, run_dir: Path, *overrides: str) -> None:
    """Train in processes that are killed when so many steps are done."""
    kind: Any = module_of(algorithm)
    step = kind.training_step

    def training_step(self: Any, *given: Any) -> Any:
        if self.steps_done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    kind.training_step = training_step
    run(run_dir, *overrides)


@pytest.mark.parametrize("algorithm", gated(list(RUNS), ["ppo"]))
def test_a_run_goes_on_with_fewer_processes_and_with_more(algorithm: str, worlds: Worlds, tmp_path: Path) -> None:
    """Four processes, three, and four: four heads and layers and three processes are three whole models."""
    run, settings, names = RUNS[algorithm]
    settings = [*settings, *ELASTIC]
    unbroken, run_dir = tmp_path / "unbroken", tmp_path / "run"
    worlds.run(4, run, unbroken, *settings)
    for world, share in ((4, 3), (3, 1.5)):
        steps = len(metrics(unbroken, *names))
        with contextlib.suppress(EOFError, ConnectionResetError):
            worlds.run(world, killed, run, algorithm, int(steps / share), run_dir, *settings)
    worlds.run(4, run, run_dir, *settings)

    assert [start["layout"] for start in starts(run_dir)] == ["TP2xDP2", "DP3", "TP2xDP2"]
    assert "launch.elastic: parallel.tp=2" in (run_dir / "logs" / "rank-0000.log").read_text()
    ours, theirs = metrics(run_dir, "step", *names), metrics(unbroken, "step", *names)
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    here, there = final_tensors(run_dir), final_tensors(unbroken)
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-4, atol=1e-5)


def refusal_of(run_dir: Path, *overrides: str) -> ConfigError:
    try:
        run_sft(run_dir, *overrides)
    except ConfigError as error:
        return error
    raise AssertionError("the run was not refused")


def test_a_run_that_is_not_elastic_is_refused_with_the_layout_that_it_could_take(
    worlds: Worlds, tmp_path: Path
) -> None:
    error = worlds.run(3, refusal_of, tmp_path, "trainer.global_batch_size=12", "parallel.tp=2")[0]
    assert_refusal(error, key="parallel.tp", value=2, offers={"parallel.tp": [1], "launch.elastic": [True]})
    assert not (tmp_path / "starts.jsonl").exists()


def test_a_run_in_its_own_layout_records_its_start(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, run_sft, tmp_path, "trainer.max_steps=1")
    (start,) = starts(tmp_path)
    assert (start["processes"], start["layout"], start["global_batch_size"], start["accumulation"]) == (1, "TP1", 8, 2)
