"""plan.json: what becomes of it where a run cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config.compose import compose
from megarl.config.sft import SFTConfig
from megarl.modules.sft import SFT
from megarl.run import prediction
from megarl.run.prediction import write_prediction
from megarl.run.run_folder import RunFolder
from megarl.tokenizers import build_tokenizer
from megarl.training import module_of

GENERATES = [
    *("rollout.max_new_tokens=4", "rollout.n=4", "trainer.global_batch_size=8", "trainer.micro_batch_size=8"),
    *("reward.fn=a:b", "data.train=[a]", "model.max_positions=32"),
]


@pytest.fixture
def module() -> SFT:
    config = SFTConfig()
    config.model.vocab_size = 300
    return SFT(config, build_tokenizer("bytes", None))


def test_a_plan_that_fails_is_a_line_of_the_log_and_an_earlier_one_is_set_aside(
    module: SFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    (tmp_path / "plan.json").write_text("{}")
    monkeypatch.setattr(prediction, "prediction", broken)
    with caplog.at_level("INFO", logger="megarl"):
        write_prediction(RunFolder(tmp_path), "sft", module.config, module)
    assert "plan.json is not written: RuntimeError: a bug" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.1.json"]


def test_a_world_that_would_take_long_to_imitate_is_not_planned(
    module: SFT, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2048")
    with caplog.at_level("INFO", logger="megarl"):
        write_prediction(RunFolder(tmp_path), "sft", module.config, module)
    assert "the run has 2048 processes" in caplog.text
    assert not (tmp_path / "plan.json").exists()


def test_each_stage_has_its_ranks_and_a_gpu_that_is_known_its_seconds(module: SFT) -> None:
    module.config.parallel.pp = 4
    found = prediction.prediction(SFT, "sft", module.config, 8, 300, gpu="NVIDIA H200")
    assert [rank["ranks"] for rank in found["ranks"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found["seconds_for"] == "H200-141G"
    assert found["phases"]["train"]["seconds"] > 0
    other = prediction.prediction(SFT, "sft", module.config, 8, 300, gpu="NVIDIA L4")
    assert (other["seconds_for"], other["phases"]["train"]["seconds"]) == (None, None)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "settings", "tokens"),
    [
        ("sft", ["trainer.global_batch_size=6", "trainer.micro_batch_size=2"], 6 * 128),
        ("dpo", ["trainer.global_batch_size=6", "trainer.micro_batch_size=2"], 2 * 6 * 128),  # pairs
        ("ppo", [*GENERATES, "ppo.rollouts=64", "ppo.inner_epochs=3"], 64 * (4 + 4)),  # each response once
        ("rft", [*GENERATES, "rft.prompts=8", "rft.improve_steps=3"], 3 * 8 * (4 + 4)),  # those that are kept
    ],
)
def test_tokens_are_those_that_a_run_counts_in_its_unit(name: str, settings: list[str], tokens: int) -> None:
    config, _ = compose(name, ["model.vocab_size=300", *settings])
    assert prediction.prediction(module_of(name), name, config, 1, 300)["tokens"] == tokens
