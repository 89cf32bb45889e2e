"""What a run comes to when it does not come to its end."""

import os
from pathlib import Path

import pytest

from megarl.config.compose import compose
from megarl.errors import CheckpointError, ConfigError
from megarl.modules.sft import SFT
from megarl.run.owner import RunLock
from megarl.run.runner import run_training
from megarl.tokenizers import build_tokenizer
from tests.refusals import refused
from tests.worlds import Worlds


class Interrupted(SFT):
    def configure_model(self) -> None:
        raise KeyboardInterrupt


def interrupted(run_dir: Path) -> None:
    config, _ = compose("sft", [f"run.dir={run_dir}", "trainer.progress=none", "logger.tensorboard=false"])
    with pytest.raises(KeyboardInterrupt):
        run_training(
            "sft", config, lambda config, sources: Interrupted(config, build_tokenizer("bytes", None), sources=sources)
        )


def test_an_interrupt_before_training_stays_an_interrupt(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, interrupted, tmp_path / "run")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_resume_from_nothing_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    config, _ = compose("sft", [f"run.dir={tmp_path / 'run'}", f"run.resume={tmp_path / name}"])
    with refused(CheckpointError, names=(f"run.resume={tmp_path / name}", "auto", "never")):
        run_training("sft", config, lambda *_: pytest.fail("built"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["run.dir", "rollout.dump", "export.hf"])
def test_a_folder_that_another_run_holds_is_refused_and_left_as_it_is(key: str, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    holder = RunLock(folder, key=key, beside=key == "export.hf")
    holder.take()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    settings = {"run.dir": tmp_path / "run", "data.train": "[prompts.jsonl]", "reward.fn": "f.py:f", key: folder}
    config, _ = compose("ppo", [f"{name}={value}" for name, value in settings.items()])
    with refused(ConfigError, key=key, value=str(folder), names=(f"process {os.getpid()}",)):
        run_training("ppo", config, lambda *_: pytest.fail("built"))
    holder.release()
    lock = tmp_path / "run" / ".owner-0000001.json"
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != lock}
    assert after.keys() == before.keys()
    config.model.path = str(tmp_path / "nowhere")
    with refused(CheckpointError, names=(f"model.path={config.model.path}",)):  # nothing is held after a refusal
        run_training("ppo", config, lambda *_: pytest.fail("built"))
