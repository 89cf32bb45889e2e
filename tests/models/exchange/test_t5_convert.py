"""T5s between formats: the same bits there and back, logits and scores of transformers, and what cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, T5ForSequenceClassification, T5Model

from megarl import convert
from megarl.config.sections.adapter import AdapterConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.experience.rows import at_last, score_rows
from megarl.models.exchange.export import export
from megarl.models.exchange.formats import merged, open_adapter, open_source
from megarl.models.exchange.logits import fixed_batch, logits
from megarl.models.exchange.parameters import SCORE
from megarl.models.exchange.peft import export_adapter
from megarl.models.exchange.source import HEADS
from tests.models.adapters import adapted_engine, stir, world_grid
from tests.models.exchange.published import stored
from tests.models.exchange.t5 import EOS, KINDS, START, VOCAB, make, pairs, rows_of, save
from tests.refusals import refused
from tests.worlds import Worlds


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t5")
    for kind in KINDS:
        save(kind, root / kind)
    return root


def converted(*commands: list[str]) -> list[int]:
    """Exit codes, in a world of one."""
    return [convert.run(words) for words in commands]


def words(origin: Path, target: Path, *more: str) -> list[str]:
    return [f"from={origin}", f"to={target}", *more]


# --- models -----------------------------------------------------------------------------------------------------------


def test_there_and_back_is_the_same_bits(worlds: Worlds, published: Path, tmp_path: Path) -> None:
    commands = [words(published / kind, tmp_path / kind) for kind in KINDS]
    commands += [words(tmp_path / kind, tmp_path / f"{kind} again") for kind in KINDS]
    assert worlds.run(1, converted, *commands) == [[0] * len(commands)]
    for kind in KINDS:
        before, after = stored(published / kind), stored(tmp_path / f"{kind} again")
        assert open_source(tmp_path / kind).kind == "megarl"
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), kind


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, published: Path, worlds: Worlds, tmp_path: Path) -> None:
    """The encoder reads the first half of the batch; both sides give what the decoder predicts of the other."""
    assert worlds.run(1, converted, words(published / kind, tmp_path / "ours")) == [[0]]
    source = open_source(tmp_path / "ours")
    tokens = fixed_batch(source)
    prompts, responses = tokens[:, :32], tokens[:, 32:].contiguous()
    with torch.no_grad():
        labelled = make(kind)(input_ids=prompts, attention_mask=torch.ones_like(prompts), labels=responses)
    for found in (logits(source, tokens), logits(open_source(published / kind), tokens)):
        torch.testing.assert_close(found, labelled.logits, rtol=1e-4, atol=1e-4)


def test_transformers_generates_from_what_a_run_exports(published: Path, worlds: Worlds, tmp_path: Path) -> None:
    """Its generation starts with the start token, which it looks for in the generation settings."""
    worlds.run(1, exported, published / "UL2", tmp_path / "out")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[5, 6, 7, EOS]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    found, wanted = (each.generate(prompt, **settings).tolist() for each in (model, make("UL2")))
    assert found == wanted
    assert found[0][0] == START


def exported(folder: Path, out: Path) -> None:
    source = open_source(folder)
    export(adapted_engine(world_grid(), None, path=folder), out, model=source.model, vocab_size=VOCAB)


def test_the_dtype_is_written_and_differences_are_told(published: Path, tmp_path: Path) -> None:
    assert convert.run(words(published / "T5 1.1", tmp_path / "narrow", "format=huggingface", "dtype=bf16")) == 0
    before, after = stored(published / "T5 1.1"), stored(tmp_path / "narrow")
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)


@pytest.mark.parametrize(
    ("more", "data"),
    [
        (["to={new}.nemo"], {"key": "model.encoder.num_layers", "value": 3}),
        (["to={new}", "format=huggingface", "family=llama"], {"key": "model.encoder.num_layers", "value": 3}),
        (["to={new}", "format=peft"], {"key": "format", "value": "peft"}),
    ],
)
def test_what_cannot_hold_a_t5_is_refused_and_leaves_nothing(
    more: list[str], data: dict[str, Any], published: Path, tmp_path: Path
) -> None:
    with refused(ConfigError, **data):
        convert.run([f"from={published / 'T5 1.0'}", *(word.format(new=tmp_path / "new") for word in more)])
    assert list(tmp_path.iterdir()) == []


def test_a_gpt_is_no_t5(tmp_path: Path) -> None:
    from tests.models.exchange.published import save_published

    save_published("qwen3", tmp_path / "qwen3")
    with refused(ConfigError, key="model.encoder.num_layers", value=None):
        convert.run(words(tmp_path / "qwen3", tmp_path / "new", "format=huggingface", "family=t5"))


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_of(base: Path, folder: Path, heads: tuple[str, ...]) -> Tensor:
    """Export an adapter with random values; the scores of responses if it has a score head."""
    engine = adapted_engine(world_grid(), AdapterConfig(rank=3, kind="dora"), path=base, heads=heads)
    stir(engine)
    export_adapter(engine, folder, model=open_source(base).model, base=str(base))
    rows = rows_of(pairs())
    scored = "score" in heads
    return at_last(score_rows(engine, rows, per_microbatch=2, share_bins=True), rows) if scored else torch.zeros(0)


def test_an_adapter_is_merged_or_written_alone(published: Path, worlds: Worlds, tmp_path: Path) -> None:
    base = published / "T5 1.1"
    worlds.run(1, adapter_of, base, tmp_path / "adapter", ("lm",))
    commands = [
        words(tmp_path / "adapter", tmp_path / "whole", "format=huggingface"),
        words(base, tmp_path / "again", f"adapter={tmp_path / 'adapter'}", "format=peft"),
    ]
    assert worlds.run(1, converted, *commands) == [[0, 0]]
    before, after = stored(base), stored(tmp_path / "whole")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 3 * (7 + 11)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_reward_models_adapter_is_one_of_the_layers_with_the_head_beside_it(
    published: Path, worlds: Worlds, tmp_path: Path
) -> None:
    """So PEFT, which has no such score head, computes the states that ours reads."""
    base, folder = published / "UL2", tmp_path / "adapter"
    (scores,) = worlds.run(1, adapter_of, base, folder, ("score",))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("FEATURE_EXTRACTION", None)
    assert load_file(folder / HEADS).keys() == {SCORE}
    assert not any("score" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not merged(open_source(base), open_adapter(folder)).has_output
    (again,) = worlds.run(1, scored, folder)
    torch.testing.assert_close(again, scores, rtol=1e-4, atol=1e-4)


# --- reward models ----------------------------------------------------------------------------------------------------


def scored(folder: Path, out: Path | None = None, **layout: Any) -> Tensor:
    """The score of each response; exports the model."""
    source, grid, rows = open_source(folder), world_grid(**layout), rows_of(pairs())
    engine = adapted_engine(grid, None, path=folder, heads=("score",))
    if out is not None:
        export(engine, out, model=source.model, vocab_size=VOCAB, score_moments=(0.5, 2.0), reward_kind="ranking")
    return at_last(score_rows(engine, rows, per_microbatch=2, share_bins=True), rows)


def test_a_reward_model_goes_out_as_layers_and_a_head_and_comes_back(
    published: Path, worlds: Worlds, tmp_path: Path
) -> None:
    """Transformers has no T5 with one linear layer above the decoder, so it reads the layers."""
    size, layout = 4, {"tp": 2, "pp": 2}
    scores = worlds.run(size, scored, published / "T5 1.1", tmp_path / "model", **layout)[0]
    assert converted(words(tmp_path / "model", tmp_path / "ours"), words(tmp_path / "ours", tmp_path / "back")) == [
        0,
        0,
    ]
    for name in ("model", "ours", "back"):
        source = open_source(tmp_path / name)
        assert not source.has_output
        assert (source.score_moments, source.reward_kind) == ((0.5, 2.0), "ranking")
        torch.testing.assert_close(worlds.run(1, scored, tmp_path / name)[0], scores, rtol=1e-4, atol=1e-4)
    before, after = stored(tmp_path / "model"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    theirs, head = T5Model.from_pretrained(tmp_path / "back").eval(), load_file(tmp_path / "back" / HEADS)[SCORE]
    for score, (prompt, response) in zip(scores, pairs(), strict=True):
        read = torch.tensor([[START, *response]])
        with torch.no_grad():
            states = theirs(input_ids=torch.tensor([prompt]), decoder_input_ids=read).last_hidden_state
        assert float(states[0, -1] @ head[0]) == pytest.approx(float(score), rel=1e-3, abs=1e-4)


def test_a_published_classifier_is_refused(tmp_path: Path) -> None:
    """It has two layers above the decoder, and the encoder reads what the decoder does."""
    settings = make("T5 1.0").config.to_dict() | {"architectures": None}
    T5ForSequenceClassification(T5Config(**settings)).save_pretrained(tmp_path / "classifier")
    with refused(CheckpointError, key="architectures", value=["T5ForSequenceClassification"]):
        open_source(tmp_path / "classifier")
    T5Model(T5Config(**settings)).save_pretrained(tmp_path / "layers")
    with refused(CheckpointError, key="architectures", value="T5Model", where="layers", names=(HEADS,)):
        open_source(tmp_path / "layers")
