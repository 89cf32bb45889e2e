"""Whole PPO runs: the same numbers in every layout, exact resume after a kill anywhere in a phase, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl.rollout.stored import load
from tests.e2e.runs import WALKS, assert_same_bits, final_tensors, metrics, run_ppo
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2+SP": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, []),
}
CRITICS = {
    "shared": ["ppo.kl_target=1", "ppo.kl_horizon=100", "ppo.scale_scores=running"],
    "separate": ["critic.kind=separate", "critic.lr=1e-3", "ppo.kl_in=loss", "ppo.entropy_coef=0.01"],
}
TO_1E5 = ("rollout/score", "rollout/kl", "rollout/kl_coef", "rollout/entropy", "policy/loss", "value/loss")
TO_1E4 = ("train/grad_norm",)


@pytest.fixture(scope="module", params=CRITICS)
def reference(request: pytest.FixtureRequest, worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a kind of critic, and, at the end, the folder of its run in one process."""
    settings = CRITICS[request.param]
    run_dir = tmp_path_factory.mktemp(request.param)
    worlds.run(1, run_ppo, run_dir, *settings, f"rollout.dump={run_dir / 'dump'}")
    return [*settings, str(run_dir)]


def course(run_dir: Path, *names: str) -> list[tuple[float, ...]]:
    found = metrics(run_dir, *names)
    assert len(found) == 2, f"{run_dir} logged {len(found)} phases of {names}"
    return found


def assert_close(ours: Path, theirs: Path, names: tuple[str, ...], relative: float) -> None:
    for phase, (mine, wanted) in enumerate(zip(course(ours, *names), course(theirs, *names), strict=True), 1):
        for name, value, expected in zip(names, mine, wanted, strict=True):
            assert value == pytest.approx(expected, rel=relative, abs=2e-6), f"{name} in phase {phase}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_run_the_same_phases(layout: str, worlds: Worlds, reference: list[str], tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    *settings, single = reference
    worlds.run(world, run_ppo, tmp_path, *settings, *overrides, f"rollout.dump={tmp_path / 'dump'}")
    ours, theirs = (load(Path(folder, "dump", "train-000000.jsonl")) for folder in (tmp_path, single))
    assert [rollout.tokens for rollout in ours] == [rollout.tokens for rollout in theirs]
    critics = ("train/critic_grad_norm",) if "critic.kind=separate" in settings else ()
    assert_close(tmp_path, Path(single), TO_1E5, 1e-5)
    assert_close(tmp_path, Path(single), TO_1E4 + critics, 1e-4)
