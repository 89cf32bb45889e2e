"""Whole runs of rejection-sampling fine-tuning."""

from pathlib import Path

import pytest

from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_rft
from tests.gated import gated
from tests.worlds import Worlds

LAYOUTS: dict[str, list[str]] = {"DP2": [], "TP2": ["parallel.tp=2"]}


@pytest.fixture(scope="module")
def whole(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases in one process, both saved."""
    run_dir = tmp_path_factory.mktemp("whole")
    worlds.run(1, run_rft, run_dir, "checkpoint.every=1", "checkpoint.keep_last=3")
    return run_dir


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2"]))
def test_layouts_train_alike(layout: str, worlds: Worlds, whole: Path, tmp_path: Path) -> None:
    worlds.run(2, run_rft, tmp_path, *LAYOUTS[layout])
    names = ("rollout/score", "rollout/distinct", "train/kept", "train/loss", "train/grad_norm")
    ours, theirs = metrics(tmp_path, *names), metrics(whole, *names)
    assert len(ours) == 2
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)
    assert 0 < theirs[0][2] < 1


def test_a_run_cut_in_two_ends_in_the_same_bits(worlds: Worlds, whole: Path, tmp_path: Path) -> None:
    half = whole / "checkpoints" / "step-0000001"
    worlds.run(1, run_rft, tmp_path, f"run.resume={half}", "checkpoint.save_last=true")
    assert_same_bits(final_tensors(tmp_path), final_tensors(whole))
