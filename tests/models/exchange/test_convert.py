"""`megarl.convert` in both directions: the same bits, counts, a verdict on the logits, and nothing half written."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megarl import convert
from megarl.errors import CheckpointError
from megarl.models.exchange.export import write_folder
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.logits import logits
from megarl.models.exchange.source import HEADS
from tests.models.exchange.published import PUBLISHED, edit_config, save_published, stirred, stored
from tests.refusals import refused
from tests.worlds import Worlds

NAMES = ("gpt2", "gpt_neox", "gptj", "opt", "qwen2_tied", "qwen3")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name in NAMES:
        save_published(name, root / name)
    return root


def converted(*pairs: tuple[Path, Path]) -> list[int]:
    """Exit codes, in a world of one."""
    return [convert.run([f"from={origin}", f"to={target}"]) for origin, target in pairs]


def test_there_and_back_is_the_same_bits(worlds: Worlds, published: Path, tmp_path: Path) -> None:
    there = [(published / name, tmp_path / name) for name in NAMES]
    back = [(tmp_path / name, tmp_path / f"{name}-again") for name in NAMES]
    assert worlds.run(1, converted, *there, *back) == [[0] * len(there + back)]
    for name in NAMES:
        before, after = stored(published / name), stored(tmp_path / f"{name}-again")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
        assert open_source(tmp_path / name).kind == "megarl"


def test_a_reward_model_is_compared_by_its_scores(worlds: Worlds, tmp_path: Path) -> None:
    kind, arguments = PUBLISHED["opt"]
    settings = getattr(transformers, kind)(**{**arguments, "num_labels": 1})
    model = stirred(transformers.AutoModelForSequenceClassification.from_config(settings))
    model.save_pretrained(tmp_path / "model")
    there, back = (tmp_path / "model", tmp_path / "megarl"), (tmp_path / "megarl", tmp_path / "back")
    assert worlds.run(1, converted, there, back) == [[0, 0]]
    tokens = torch.arange(20)[None]
    source = open_source(tmp_path / "back")
    assert not source.has_output
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(logits(source, tokens)[:, -1], expected)


def test_a_narrower_dtype_is_written_and_said(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"from={published / 'qwen3'}", f"to={tmp_path / 'narrow'}", "dtype=bf16", "format=huggingface"]
    assert convert.run(command) == 0
    said = capsys.readouterr().out
    assert "bfloat16" in said
    assert "left out: nothing" in said
    before, after = stored(published / "qwen3"), stored(tmp_path / "narrow")
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)


def test_logits_that_differ_are_exit_code_1(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(source: object, settings: convert.Settings, dtype: object) -> None:
        shutil.copytree(published / "qwen3", settings.target)
        weights = load_file(settings.target / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][0] += 0.05
        save_file(weights, settings.target / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(convert, "write", spoilt)
    assert convert.run([f"from={published / 'qwen3'}", f"to={tmp_path / 'other'}"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["form=x"], {"key": "form=x"}),
        (["from=x"], {"key": "to"}),
        (["from=x", "to=y", "dtype=int4"], {"key": "dtype", "value": "int4"}),
        (["from=x", "to=/tmp"], {"kind": CheckpointError, "where": "/tmp"}),
        (["from={model}", "to={new}", "family=bert"], {"key": "family", "value": "bert"}),
        (["from={model}", "to={new}", "format=onnx"], {"key": "format", "value": "onnx"}),
        (["from={model}", "to={new}", "format=huggingface", "family=llama"], {"key": "model.position"}),
        (["from={model}", "to={new}", "format=peft"], {"key": "format", "value": "peft", "names": ("adapter=",)}),
        (["from={model}", "to={new}", "adapter={model}"], {"kind": CheckpointError, "where": "opt"}),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_words_are_refused_and_leave_nothing(
    words: list[str], data: dict[str, Any], published: Path, tmp_path: Path
) -> None:
    words = [word.format(model=published / "opt", new=tmp_path / "new") for word in words]
    with refused(**data):
        convert.run(words)
    assert list(tmp_path.iterdir()) == []


def save_adapter(folder: Path, base: Path | None, rank: int = 3, alpha: int = 6) -> dict[str, torch.Tensor]:
    """Write a PEFT folder beside the `qwen3` model, without PEFT; its tensors by their stored names."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"q_proj": (48, 32), "v_proj": (24, 32)}
    tensors = {}
    for layer in range(2):
        for module, (rows, columns) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{place}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=generator)
            tensors[f"{place}.lora_B.weight"] = 0.3 * torch.randn(rows, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(shapes)}
    config["base_model_name_or_path"] = None if base is None else str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_an_adapter_is_merged_into_the_model_that_is_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = save_adapter(tmp_path / "adapter", base=None)
    words = [f"from={published / 'qwen3'}", f"adapter={tmp_path / 'adapter'}", f"to={tmp_path / 'whole'}"]
    assert convert.run(words) == 0
    assert "rank 3" in capsys.readouterr().out
    before, after = stored(published / "qwen3"), stored(tmp_path / "whole")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 4
    for name in changed:
        down, up = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(after[name], before[name] + 2 * up @ down)
    with refused(CheckpointError, key="adapter", where="adapter"):
        convert.run([f"from={tmp_path / 'adapter'}", f"to={tmp_path / 'other'}"])


def test_a_merge_is_compared_with_weights_that_were_not_rounded(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 model reads as the float32 sum, so that the written bf16 weights differ, and fp32 ones do not."""
    model = tmp_path / "model"
    write_folder(open_source(published / "qwen3"), model, dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base=model)
    verdicts = []
    monkeypatch.setattr(convert, "report", lambda source, target, *numbers: verdicts.append(numbers))
    for dtype in ("bf16", "fp32"):
        assert convert.run([f"from={tmp_path / 'adapter'}", f"to={tmp_path / dtype}", f"dtype={dtype}"]) == 0
    (rounded, coarse), (exact, fine) = verdicts
    assert exact < fine < rounded < coarse


def test_the_adapter_alone_is_written_with_the_model_that_is_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, model = save_adapter(tmp_path / "adapter", base=tmp_path / "moved"), published / "qwen3"
    assert convert.run([f"from={model}", f"adapter={tmp_path / 'adapter'}", f"to={tmp_path / 'a'}", "format=peft"]) == 0
    assert convert.run([f"from={tmp_path / 'a'}", f"to={tmp_path / 'b'}", "format=peft", "dtype=bf16"]) == 0
    assert "the same" in capsys.readouterr().out
    again, narrow = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert again.keys() == narrow.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(narrow[name], tensor.bfloat16())
    for name in "ab":
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            model
        )
    with refused(key="family", value="llama", offers={"family": ["qwen3"]}):
        convert.run([f"from={tmp_path / 'a'}", f"to={tmp_path / 'c'}", "format=peft", "family=llama"])


def test_values_that_a_dtype_cannot_hold_are_refused_and_leave_nothing(published: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(published / "opt", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.decoder.layers.0.fc1.weight"][0, 0] = 1e5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with refused(CheckpointError, key="decoder.layers.0.mlp.linear_fc1.weight", value=1e5):
        convert.run([f"from={model}", f"to={tmp_path / 'half'}", "dtype=fp16", "format=huggingface"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_half_way_leaves_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(published / "gpt2")
    read = source.read

    def full(name: str) -> torch.Tensor:
        if name.startswith("decoder.layers.1.mlp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read(name)

    monkeypatch.setattr(source, "read", full)
    with refused(CheckpointError, where=str(tmp_path / "new"), names=(os.strerror(errno.ENOSPC),)):
        write_folder(source, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_heads_ride_along_in_a_file_of_their_own(worlds: Worlds, published: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(published / "gpt2", tmp_path / "model"))
    head = {"value_head.weight": torch.randn(1, 32), "value_head.bias": torch.randn(1)}
    save_file(head, model / HEADS)
    assert worlds.run(1, converted, (model, tmp_path / "megarl"), (tmp_path / "megarl", tmp_path / "back")) == [[0, 0]]
    again = load_file(tmp_path / "back" / HEADS)
    assert again.keys() == head.keys()
    assert all(torch.equal(head[key], again[key]) for key in head)


def test_files_of_the_tokenizer_and_token_ids_come_along(published: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(published / "qwen3", tmp_path / "model"))
    (model / "tokenizer.json").write_text("{}")
    (model / "merges.txt").write_text("a b")
    edit_config(model, eos_token_id=[3, 4])
    write_folder(open_source(model), tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "copy" / "merges.txt").read_text() == "a b"
    assert open_source(tmp_path / "copy").token_ids["eos_token_id"] == [3, 4]
