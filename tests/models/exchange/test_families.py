"""Every family, in and out: the log-probs of transformers in every layout, and the same bits back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.errors import CheckpointError
from megarl.experience.rows import forward_rows
from megarl.experience.start_weights import FOLDER, keep
from megarl.models.build import build_engine
from megarl.models.exchange import export as writer
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.export import export, write_folder
from megarl.models.exchange.families import FAMILIES, family_for
from megarl.models.exchange.family import shape_of
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.parameters import parameters
from megarl.models.roles import Role
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import Microbatch, Rows
from megarl.tokenizers import build_tokenizer
from tests.chat import templates
from tests.chat.templates import CHATML
from tests.gated import gated
from tests.models.exchange.published import PUBLISHED, VOCAB, fixed_tokens, save_published, stored
from tests.test_tokenizers import make_hugging_face
from tests.worlds import Worlds

LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2xPP2": (2, 2)}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Folder and transformers' logits of every model."""
    root = tmp_path_factory.mktemp("published")
    return {name: (root / name, save_published(name, root / name)) for name in PUBLISHED}


def import_and_export(folders: dict[str, Path], tp: int, pp: int, out: Path) -> dict[str, Any]:
    """Log-probs of the fixed tokens by name, and whether names and shapes are those foretold; exports everything."""
    device = start_world()
    results: dict[str, Any] = {}
    for name, folder in folders.items():
        grid = Grid(Layout(tp=tp, pp=pp), device)
        source = open_source(folder)
        model = source.model
        role = Role("policy", model, VOCAB, source=source)
        engine = build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1)
        tokens = fixed_tokens()
        rows = Rows(tokens, torch.full((len(tokens),), tokens.shape[1]), torch.ones(tokens.shape))

        def logprobs(gpt: Any, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            return {"logprobs": gpt.logprobs(hidden, batch.targets, batch.target_mask).logprobs}

        found = forward_rows(engine, rows, logprobs, per_microbatch=len(rows), share_bins=False)["logprobs"]
        results[name] = (found, {name: tuple(parameter.shape) for name, parameter in engine.parameters()})
        export(engine, out / name, model=model, vocab_size=VOCAB, family=source.family and source.family.name)
        grid.close()
    return results


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2", "PP2"]))
def test_every_family_computes_what_transformers_does_and_goes_back_bit_for_bit(
    layout: str, worlds: Worlds, published: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    tp, pp = LAYOUTS[layout]
    folders = {name: folder for name, (folder, _) in published.items()}
    ranks = worlds.run(tp * pp, import_and_export, folders, tp, pp, tmp_path)
    tokens = fixed_tokens()
    for name, (folder, logits) in published.items():
        wanted = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, tokens[:, 1:, None])[..., 0]
        assert float(wanted.std()) > 0.3, f"{name} is too flat to prove anything"
        for rank in ranks:
            assert float((rank[name][0][:, 1:] - wanted).abs().max()) < 1e-4, name
        before, after = stored(folder), stored(tmp_path / name)
        assert before.keys() == after.keys(), name
        assert [key for key in before if not torch.equal(before[key], after[key])] == [], name


def test_the_parameters_foretold_are_those_of_the_model_built(
    worlds: Worlds, published: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    folders = {name: folder for name, (folder, _) in published.items()}
    (results,) = worlds.run(1, import_and_export, folders, 1, 1, tmp_path)
    for name, (folder, _) in published.items():
        foretold = parameters(open_source(folder).model, VOCAB)
        padded = {key: (56, *shape[1:]) if shape[0] == VOCAB else shape for key, shape in foretold.items()}
        assert results[name][1] == padded, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_loads_what_is_exported(
    name: str, worlds: Worlds, published: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    folder, logits = published[name]
    worlds.run(1, import_and_export, {name: folder}, 1, 1, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = fixed_tokens()
    with torch.no_grad():
        again = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert torch.equal(again, logits)


def export_with_a_full_disk_on_the_last_stage(folder: Path, out: Path) -> str:
    """What a rank is told when another cannot write in the middle of its file."""
    device = start_world()
    grid = Grid(Layout(tp=2, pp=2), device)
    model = open_source(folder).model
    engine = build_engine(Role("policy", model, VOCAB), grid, ParallelConfig(), precision="fp32", seed=1)
    cast_checked = writer.cast_checked

    def full(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if name == "decoder.layers.1.mlp.linear_fc1.weight":
            raise OSError(28, "No space left on device")
        return cast_checked(name, tensor, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "cast_checked", full)
        try:
            export(engine, out, model=model, vocab_size=VOCAB)
        except CheckpointError as problem:
            return str(problem)
        finally:
            grid.close()
    return "exported"


def test_a_disk_that_is_full_on_one_rank_ends_all_of_them_and_leaves_nothing(
    worlds: Worlds, published: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    said = worlds.run(4, export_with_a_full_disk_on_the_last_stage, published["llama"][0], tmp_path / "out")
    assert len(set(said)) == 1
    assert "No space left on device" in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("t5")])  # see test_t5.py
def test_a_configuration_goes_out_and_comes_back(name: str) -> None:
    family = FAMILIES[name]
    config, arguments = next(value for key, value in PUBLISHED.items() if key.startswith(name))
    published = getattr(transformers, config)(**arguments).to_dict()
    model = family.model_config(published)
    assert shape_of(family.model_config(family.hf_config(model, VOCAB))) == shape_of(model)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"sliding_window": 8}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True, "head_dim": 24}, "qwen3"),
        ({"num_kv_heads": 2, "qkv_bias": True, "sliding_window": 4}, "qwen2"),
    ],
    ids=str,
)
def test_a_model_from_scratch_finds_the_family_that_holds_it(changes: dict[str, Any], family: str) -> None:
    assert family_for(ModelConfig(**changes)).name == family


def export_with_template(words: str, template: str, out: Path) -> None:
    """Export a small model to `out`/live, and what its checkpoint says of it to `out`/stored."""
    grid = Grid(Layout(), start_world())
    tokenizer = build_tokenizer("huggingface", words)
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, ffn_size=8, max_positions=8)
    card = ModelCard.of(model, tokenizer.size, tokenizer, TokenizerConfig("huggingface", words), template)
    engine = build_engine(Role("policy", model, tokenizer.size), grid, ParallelConfig(), precision="fp32", seed=1)
    export(engine, out / "live", model=model, vocab_size=tokenizer.size, tokenizer=tokenizer, chat_template=template)
    write_folder(open_source(out / FOLDER / keep(engine, card, out)), out / "stored")
    grid.close()


@pytest.mark.parametrize(
    ("own", "runs", "stops"), [(None, CHATML, [1, 3]), (CHATML, templates.SYSTEM_LAST, 1), (CHATML, None, [1, 3])]
)
def test_an_exported_model_stops_where_the_runs_chat_template_ends_an_answer(
    own: str | None, runs: str | None, stops: Any, worlds: Worlds, tmp_path: Path
) -> None:
    words = make_hugging_face(tmp_path / "words", chat_template=own)
    worlds.run(1, export_with_template, words, runs, tmp_path)
    for name in ("live", "stored"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == stops, name
