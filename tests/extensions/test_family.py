"""A family of models outside of megarl: read, trained from in every layout, exported and converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megarl import convert, listing
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.families import FAMILIES, _add_announced, add_families, register_family
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.logits import logits
from tests.e2e.runs import SMALL, run_entry
from tests.extensions.conftest import Install
from tests.extensions.stablelm import STABLELM
from tests.models.exchange.published import fixed_tokens, stirred, stored
from tests.refusals import assert_entry_refuses, refused
from tests.worlds import Worlds

NAME = f"{Path(__file__).parent / 'stablelm.py'}:STABLELM"
KEY = "extensions.families"
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def published(folder: Path) -> Tensor:
    """Save a random StableLM with grouped heads and biases; return its logits of the fixed tokens."""
    config = transformers.StableLmConfig(
        **SIZE, num_key_value_heads=2, vocab_size=262, use_qkv_bias=True, max_position_embeddings=64
    )
    model = stirred(transformers.AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    tokens = fixed_tokens()
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return result


def trained_without_learning(folder: Path, run_dir: Path) -> None:
    """A step with a rate of 0, whose export must be what was read."""
    own = [f"{KEY}=[{NAME}]", f"model.path={folder}", "data.seq_length=32", f"export.hf={run_dir}-hf"]
    size = [setting for setting in SMALL if not setting.startswith("model.")]
    run_entry("sft", [*size, *own, f"run.dir={run_dir}", "trainer.max_steps=1", "optim.lr=0", "parallel.tp=2"])


def there_and_back(folder: Path) -> list[int]:
    commands = [
        [f"from={folder}", f"to={folder}-megarl", f"families={NAME}"],
        [f"from={folder}-megarl", f"to={folder}-again", f"families={NAME}"],
    ]
    return [convert.run(command) for command in commands]


def test_a_published_model_of_the_family_goes_in_and_out(worlds: Worlds, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    expected = published(folder)
    with refused(CheckpointError, key="architectures", names=("StableLmForCausalLM", KEY)):
        open_source(folder)
    add_families([NAME])
    torch.testing.assert_close(logits(open_source(folder), fixed_tokens()), expected, atol=1e-4, rtol=1e-4)
    worlds.run(2, trained_without_learning, folder, tmp_path / "run")
    assert worlds.run(1, there_and_back, folder) == [[0, 0]]
    before = stored(folder)
    for again in (stored(tmp_path / "run-hf"), stored(tmp_path / "model-again")):
        assert before.keys() == again.keys()
        assert all(torch.equal(before[name], again[name]) for name in before)


def test_an_installed_package_announces_a_family(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("stable", families="stablelm = tests.extensions.stablelm:STABLELM")
    install("broken", families="nothing = nowhere_at_all:FAMILY")
    assert ("stablelm", "tests.extensions.stablelm:STABLELM of stable 1.2") in list(listing.families())
    _add_announced()
    assert FAMILIES["stablelm"] is STABLELM
    assert "broken 1.2" in caplog.text
    assert "nowhere_at_all" in caplog.text


def test_a_family_that_is_there_already_is_refused() -> None:
    add_families([NAME])
    add_families([NAME])
    for again in (STABLELM, type(STABLELM)(**{**vars(STABLELM), "name": "stable2"})):
        with refused(ConfigError, key="register_family", names=("stablelm", NAME)):
            register_family(again)
    llama = type(STABLELM)(**{**vars(STABLELM), "name": "mine", "architectures": ("LlamaForCausalLM",)})
    with refused(ConfigError, key="register_family", names=("LlamaForCausalLM", "llama")):
        register_family(llama)
    assert "mine" not in FAMILIES


@pytest.mark.parametrize(
    ("text", "names"), [("OWN = 3", ("int", "Family")), ("OWN = len(5)", ("TypeError", "own.py:1"))]
)
def test_what_is_no_family_is_refused(text: str, names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with refused(ConfigError, key=KEY, value=f"{file}:OWN", names=names):
        add_families([f"{file}:OWN"])


@pytest.mark.parametrize("entry", ["sft", "generate"])
def test_a_family_that_does_not_exist_is_refused_before_anything_is_imported(
    entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, more = f"{NAME}S", ["model.path=org/model", "prompts=a"] if entry == "generate" else []
    assert_entry_refuses(entry, [f"{KEY}=[{wrong}]", *more], (f"{KEY}={wrong}", "STABLELM"), capsys)


def test_convert_names_a_wrong_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with refused(ConfigError, key="families", value="nowhere:X"):
        convert.run([f"from={tmp_path}", f"to={tmp_path / 'to'}", "families=nowhere:X"])
