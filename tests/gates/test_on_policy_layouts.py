"""Every on-policy algorithm takes the same ten steps in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sweeps import PRESETS
from tests.e2e.runs import WALKS, metrics, run_entry, updates, updates_written_to
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
UPDATE = ("train/loss", "policy/loss")
LENGTH_REWARD = ["reward.fn=megarl.rewards.builtin:length", "ppo.clip_scores=null"]  # differs in every group
NAMES = ("train/loss", "policy/loss", "rollout/score", "rollout/entropy", "rollout/response_tokens")


def run(run_dir: Path, entry: str, preset: str, *overrides: str) -> None:
    """Five phases of 32 responses with two steps each, in the current world. Every step is a line of
    `updates_file(run_dir)`."""
    own = ["ppo.rollouts=32", "ppo.inner_epochs=1", "trainer.global_batch_size=16", "trainer.micro_batch_size=4"]
    more = [f"trainer.max_phases={PHASES}", "ppo.stop_at_kl=null", *LENGTH_REWARD, f"run.dir={run_dir}"]
    with updates_written_to(updates_file(run_dir)):
        run_entry(entry, [preset, *WALKS[1:], *own, *more, *overrides])


def updates_file(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}-updates.jsonl")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ten_steps_are_the_same_in_every_layout(algorithm: str, worlds: Worlds, tmp_path: Path) -> None:
    entry, preset = ALGORITHMS[algorithm]
    worlds.run(1, run, tmp_path / "one", entry, preset)
    wanted = metrics(tmp_path / "one", *NAMES)
    wanted_updates = updates(updates_file(tmp_path / "one"), *UPDATE)
    assert len(wanted_updates) == PHASES * STEPS
    assert len(set(wanted_updates)) == PHASES * STEPS
    for name, (world, overrides) in LAYOUTS.items():
        worlds.run(world, run, tmp_path / name, entry, preset, *overrides)
        for row, expected in zip(metrics(tmp_path / name, *NAMES), wanted, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        for row, expected in zip(updates(updates_file(tmp_path / name), *UPDATE), wanted_updates, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=2e-6), name  # an update's loss may be near 0
