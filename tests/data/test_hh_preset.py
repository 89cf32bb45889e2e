"""The preset `hh` reads the layout of Anthropic/hh-rlhf."""

import re
import shlex
from pathlib import Path

import pytest

from megarl.config.compose import compose
from megarl.config.resources import conf_folder
from megarl.data.build import build_sft_data
from megarl.data.pairs import build_preference_data
from megarl.tokenizers import ByteTokenizer
from tests.hh import THINGS, write_hh

BYTES = ByteTokenizer()
_COMMENT = "".join(line[1:] for line in (conf_folder() / "hh.yaml").open() if line.startswith("#"))
COMMANDS = [shlex.split(line) for line in re.findall(r"python -m megarl\.train_(.*)", _COMMENT.replace("\\\n", ""))]
"""The commands of the preset's first lines: an entry point with its settings."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with both splits, in place of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hh").mkdir()
    write_hh(tmp_path / "hh")
    return f"data.train=[{tmp_path / 'hh'}]"


def test_the_preset_names_the_hub_and_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = compose("dpo", ["+conf=hh"])[0].data
    assert data.train == data.eval == ["Anthropic/hh-rlhf"]
    assert (data.train_split, data.eval_split) == ("train", "test")


def test_the_prompt_is_what_both_transcripts_begin_with(files: str) -> None:
    data = compose("dpo", ["+conf=hh", files, files.replace("train", "eval")])[0].data
    train, held_out = build_preference_data(data, BYTES, "pairs")
    assert held_out is not None
    assert len(train) == len(held_out) == len(THINGS)
    assert train.stats.unusable.count == 1, "the record with two equal transcripts"
    found = []
    for document in train.documents[:2]:
        mask = document.action_mask.astype(bool)
        found.append((BYTES.decode(document.tokens[~mask]), BYTES.decode(document.tokens[mask])))
        assert document.tokens[-1] == BYTES.eos_id
    chosen, rejected = found
    assert chosen == (rejected[0], "Yes, I see the river.")
    assert rejected[0].endswith("\n\nHuman: The small river.\n\nAssistant: ")
    assert rejected[1] == "Go away."
    assert BYTES.decode(held_out.documents[0].tokens).startswith("\n\nHuman: Is there a river?")


def test_fine_tuning_with_the_preset_reads_the_preferred_transcripts(files: str) -> None:
    config, _ = compose("sft", ["+conf=hh", files, "data.eval=[]"])
    train, _ = build_sft_data(config, BYTES)
    texts = [BYTES.decode(train.row(index)[0].tokens) for index in range(len(train))]
    assert texts[1].endswith("\n\nAssistant: Yes, I see the river.")


def test_a_reward_model_with_the_preset_ranks_the_same_transcripts(files: str) -> None:
    config, _ = compose("rm", ["+conf=hh", files, files.replace("train", "eval"), "optim.lr=1e-5"])
    assert (config.rm.center_coef, config.trainer.global_batch_size, config.data.seq_length) == (0.01, 64, 512)
    train, held_out = build_preference_data(config.data, BYTES, config.rm.kind)
    assert held_out is not None
    assert len(train) == len(held_out) == len(THINGS)
    assert train.per_row["level"].tolist() == [1.0, 0.0] * len(THINGS)
    assert train.stats.unusable.count == 1, "the record with two equal transcripts"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_the_commands_in_the_presets_first_lines_compose(command: list[str], files: str) -> None:
    entry, *settings = command
    compose(entry, settings)
