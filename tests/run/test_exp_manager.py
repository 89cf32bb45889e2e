"""NeMo's exp_manager is given the Trainer with what is megarl's own switched off; here a stand-in takes its place."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from megarl.config.compose import compose
from megarl.errors import ConfigError, UnavailableError
from megarl.run.exp_manager import attach_nemo_exp_manager
from tests.refusals import refused


class Timing(Callback):
    """What NeMo would add."""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for NeMo was called with. It refuses a Trainer with loggers, as NeMo does."""
    calls: list[dict[str, Any]] = []

    def exp_manager(trainer: Trainer, cfg: dict[str, Any]) -> None:
        assert trainer.logger is None
        if "unknown" in cfg:
            raise KeyError("unknown")
        trainer.callbacks.insert(0, Timing())
        calls.append(cfg)

    module = ModuleType("nemo.utils.exp_manager")
    module.exp_manager = exp_manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo", ModuleType("nemo"))
    monkeypatch.setitem(sys.modules, "nemo.utils", ModuleType("nemo.utils"))
    monkeypatch.setitem(sys.modules, "nemo.utils.exp_manager", module)
    return calls


def trainer(folder: Path) -> Trainer:
    return Trainer(accelerator="cpu", logger=CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False)


@pytest.mark.parametrize("written", ["extensions.nemo=true", "trainer/exp_manager=nemo", "trainer.exp_manager=nemo"])
def test_the_key_in_its_present_and_earlier_spellings_takes_options(written: str) -> None:
    config, _ = compose("sft", [written, "+extensions.exp_manager.log_delta_step_timing=true"])
    assert config.extensions.nemo
    assert config.extensions.exp_manager == {"log_delta_step_timing": True}
    assert not compose("sft", ["trainer/exp_manager=none"])[0].extensions.nemo


def test_checkpoints_resuming_and_stopping_stay_ours(given: list[dict[str, Any]], tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    loggers = ours.loggers
    attach_nemo_exp_manager(ours, {"log_delta_step_timing": True}, tmp_path)
    (told,) = given
    off = ("create_checkpoint_callback", "create_preemption_callback", "resume_if_exists", "create_tensorboard_logger")
    assert {name: told[name] for name in off} == dict.fromkeys(off, False)
    assert told["disable_validation_on_resume"] is False, "it would replace the loop"
    assert told["explicit_log_dir"] == str(tmp_path / "nemo")
    assert told["log_delta_step_timing"] is True
    assert ours.loggers == loggers
    assert isinstance(ours.callbacks[0], Timing)


def test_an_option_that_is_ours_is_refused_by_name(given: list[dict[str, Any]], tmp_path: Path) -> None:
    key = "extensions.exp_manager.resume_if_exists"
    with refused(ConfigError, key=key, value=True, names=("run.resume",)):
        attach_nemo_exp_manager(trainer(tmp_path), {"resume_if_exists": True}, tmp_path)
    assert not given


def test_what_nemo_refuses_is_one_line(given: list[dict[str, Any]], tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    with refused(ConfigError, key="extensions.nemo", value=True, names=("KeyError: 'unknown'",)):
        attach_nemo_exp_manager(ours, {"unknown": 1}, tmp_path)
    assert len(ours.loggers) == 1


def test_without_nemo_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nemo.utils.exp_manager", None)  # an import of None fails
    with refused(UnavailableError, key="extensions.nemo", value=True, names=("megarl[nemo]",)):
        attach_nemo_exp_manager(trainer(tmp_path), {}, tmp_path)
