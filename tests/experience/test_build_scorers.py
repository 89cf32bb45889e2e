"""The scorers that a configuration names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.ppo import PPOConfig
from megarl.experience import build_scorers
from megarl.experience.build_scorers import ScorerBuilder


@pytest.mark.parametrize(("kind", "lines"), [("steps", 1), ("ranking", 0), (None, 0)])
def test_a_reward_model_of_steps_is_announced(
    kind: str | None, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_scorers, "ModelScorer", lambda *args, **options: None)
    config = PPOConfig()
    config.reward.model = "runs/rm"
    sources: Any = SimpleNamespace(at=lambda path: SimpleNamespace(reward_kind=kind))
    nothing: Any = None
    engines: Any = {"reward": None}
    builder = ScorerBuilder(config, nothing, nothing, engines, sources, tmp_path, micro_batch_size=1)
    with caplog.at_level("INFO", logger="megarl"):
        builder.scorers()
    assert len([record for record in caplog.records if "runs/rm" in record.getMessage()]) == lines
