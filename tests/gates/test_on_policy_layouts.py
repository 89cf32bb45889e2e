"""Every on-policy algorithm takes the same ten steps in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sweeps import PRESETS
from tests.e2e.runs import WALKS, metrics, run_entry
from tests.worlds import Worlds

pytestmark = [pytest.mark.gate, pytest.mark.timeout(1800)]
ALGORITHMS = {
    **{preset: (entry, f"+conf=[randomwalks,{preset}]") for preset, entry in PRESETS.items()},
    "ppo": ("ppo", "+conf=randomwalks"),
    "grpo": ("grpo", "+conf=randomwalks"),
}
LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "DP2": (2, []),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
}
PHASES, STEPS = 5, 2
NAMES = ("train/loss", "policy/loss", "rollout/score", "rollout/entropy", "rollout/response_tokens")


def run(run_dir: Path, entry: str, preset: str, *overrides: str) -> None:
    """Five phases of 32 responses with two steps each, in the current world."""
    own = ["ppo.rollouts=32", "ppo.inner_epochs=1", "trainer.global_batch_size=16", "trainer.micro_batch_size=4"]
    more = [f"trainer.max_phases={PHASES}", "ppo.stop_at_kl=null", f"run.dir={run_dir}"]
    run_entry(entry, [preset, *WALKS[1:], *own, *more, *overrides])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ten_steps_are_the_same_in_every_layout(algorithm: str, worlds: Worlds, tmp_path: Path) -> None:
    entry, preset = ALGORITHMS[algorithm]
    worlds.run(1, run, tmp_path / "one", entry, preset)
    wanted = metrics(tmp_path / "one", *NAMES)
    steps = metrics(tmp_path / "one", "train/optimizer_steps")
    assert sum(count for (count,) in steps) == PHASES * STEPS
    assert len({loss for loss, *_ in wanted}) == PHASES
    for name, (world, overrides) in LAYOUTS.items():
        worlds.run(world, run, tmp_path / name, entry, preset, *overrides)
        for row, expected in zip(metrics(tmp_path / name, *NAMES), wanted, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6), name
