"""Whole runs of rejection-sampling fine-tuning."""

from pathlib import Path

import pytest

from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_rft
from tests.worlds import Worlds


def test_two_layouts_train_alike_and_a_run_cut_in_two_ends_in_the_same_bits(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, run_rft, tmp_path / "whole", "checkpoint.every=1", "checkpoint.keep_last=3")
    worlds.run(2, run_rft, tmp_path / "two", "parallel.tp=2")
    names = ("rollout/score", "rollout/distinct", "train/kept", "train/loss", "train/grad_norm")
    ours, theirs = metrics(tmp_path / "two", *names), metrics(tmp_path / "whole", *names)
    assert len(ours) == 2
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)
    assert 0 < theirs[0][2] < 1
    half = tmp_path / "whole" / "checkpoints" / "step-0000001"
    worlds.run(1, run_rft, tmp_path / "resumed", f"run.resume={half}", "checkpoint.save_last=true")
    assert_same_bits(final_tensors(tmp_path / "resumed"), final_tensors(tmp_path / "whole"))
