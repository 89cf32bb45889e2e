"""The strategy of a run whose code is typed in, in a notebook or at Python's prompt."""

import sys
from typing import Any

import pytest
from lightning.pytorch import Trainer

from megarl.checkpoint import ShardedCheckpointIO
from megarl.config.sections.parallel import ParallelConfig
from megarl.errors import ConfigError
from megarl.parallel.strategy import MegatronStrategy
from tests.refusals import refused


def launcher(devices: int) -> Any:
    """What starts the other processes of a run."""
    strategy = MegatronStrategy(ParallelConfig(), seed=1, checkpoint_io=ShardedCheckpointIO(False))
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False).strategy.launcher


def test_a_script_is_started_again_for_further_processes() -> None:
    assert launcher(2) is not None


def test_a_notebook_trains_in_one_process_and_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert launcher(1) is None
    with refused(ConfigError, key="trainer.devices", value=2, offers={"processes": [2]}):
        launcher(2)
