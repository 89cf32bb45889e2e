"""What every module keeps in a checkpoint, and compares with when it resumes."""

from pathlib import Path
from typing import Any

from megarl.config.sft import SFTConfig
from megarl.modules.sft import SFT
from megarl.tokenizers import ByteTokenizer


def test_a_resume_compares_the_text_of_the_chat_template(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    config = SFTConfig()
    config.data.chat_template = str(template)
    template.write_text("{{ messages[0].content }}")
    checkpoint: dict[str, Any] = {"folder": "RUN/step-1"}
    SFT(config, ByteTokenizer()).on_save_checkpoint(checkpoint)
    for text, changed in (("{{ messages[0].content }}", set()), ("{{ 'other' }}", {"data.chat_template"})):
        template.write_text(text)
        resumed = SFT(config, ByteTokenizer())
        resumed.on_load_checkpoint(checkpoint)
        assert resumed.changed == changed
