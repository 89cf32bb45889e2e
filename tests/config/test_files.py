"""What a configuration names on disk is read before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.config.files import check_files
from megarl.config.generate import GenerateConfig
from megarl.config.ppo import PPOConfig
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sft import SFTConfig
from megarl.errors import CheckpointError, ConfigError
from tests.refusals import refused


@pytest.mark.parametrize("tree", [SFTConfig, PPOConfig, GenerateConfig])
def test_a_chat_template_that_cannot_be_read_is_refused_by_its_key(tree: Any, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    config = tree()
    section, key = (config, "chat_template") if tree is GenerateConfig else (config.data, "data.chat_template")
    section.chat_template = str(template)
    template.write_text("{{ messages }}")
    check_files(config)
    template.write_bytes(b"{{ '\xe9' }}")
    with refused(ConfigError, key=key, value=str(template), where=str(template)):  # not UTF-8
        check_files(config)
    template.unlink()
    with refused(ConfigError, key=key, value=str(template)) as missing:
        check_files(config)
    assert missing.error.where is None


def test_a_path_without_an_adapter_is_refused_and_a_run_or_a_hub_name_may_have_one(tmp_path: Path) -> None:
    config = SFTConfig(adapter=AdapterConfig(path=str(tmp_path)))
    with refused(CheckpointError, key="adapter.path", value=str(tmp_path), where=str(tmp_path)):
        check_files(config)
    (tmp_path / "checkpoints" / "step-0000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-0000001" / "index.json").write_text("{}")
    check_files(config)
    check_files(SFTConfig(adapter=AdapterConfig(path="org/adapter")))
    with refused(CheckpointError, key="adapter.path", value="./nowhere", where="./nowhere"):
        check_files(SFTConfig(adapter=AdapterConfig(path="./nowhere")))


def test_files_are_checked_without_heavy_imports() -> None:
    code = "import sys, megarl.config.files; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
