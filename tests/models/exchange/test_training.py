"""Training from a published model and exporting at the end, as one would: import, five steps, export, generate."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.checkpoint import find
from megarl.config.compose import compose
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.formats import open_source
from megarl.training import train
from tests.e2e.runs import SMALL, metrics, run_sft
from tests.models.exchange.published import edit_config, save_published, stored
from tests.refusals import refused
from tests.worlds import Worlds

VOCAB = 301  # holds the byte tokenizer; no layout divides it
FIVE = ["trainer.max_steps=5", "data.seq_length=64", "data.eval=[]"]
LAYOUTS = {"TP1": (1, []), "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2"])}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "qwen2"
    save_published("qwen2_tied", folder, vocab_size=VOCAB)
    return folder


@pytest.fixture(scope="module")
def trained(worlds: Worlds, published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's folder per layout; the model is exported beside it."""
    root = tmp_path_factory.mktemp("trained")
    for layout, (world, overrides) in LAYOUTS.items():
        out = root / layout / "exported"
        worlds.run(
            world, run_sft, root / layout / "run", *FIVE, *overrides, f"model.path={published}", f"export.hf={out}"
        )
    return {layout: root / layout for layout in LAYOUTS}


def test_layouts_train_an_imported_model_alike_and_export_it(trained: dict[str, Path], published: Path) -> None:
    one, four = (metrics(trained[layout] / "run", "train/loss") for layout in LAYOUTS)
    assert len(one) == 5
    assert [loss for (loss,) in four] == pytest.approx([loss for (loss,) in one], rel=1e-5)
    before, after, sharded = (stored(folder) for folder in (published, *(trained[key] / "exported" for key in LAYOUTS)))
    assert before.keys() == after.keys() == sharded.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) == len(before)
    for key in before:
        assert torch.allclose(after[key], sharded[key], rtol=0, atol=1e-3), key  # Adam amplifies the last bits


def test_the_first_loss_is_that_of_the_published_weights(worlds: Worlds, published: Path, tmp_path: Path) -> None:
    """A model that starts elsewhere starts at another loss."""
    still = [*FIVE, "trainer.max_steps=1", "optim.lr=0"]
    worlds.run(1, run_sft, tmp_path / "imported", *still, f"model.path={published}", f"export.hf={tmp_path / 'same'}")
    before, after = stored(published), stored(tmp_path / "same")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_generates_from_an_export(layout: str, trained: dict[str, Path]) -> None:
    folder = trained[layout] / "exported"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    prompt = torch.tensor([list(b"Hello")])
    answer = theirs.generate(prompt, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > prompt.shape[1]
    assert torch.equal(answer[:, :5], prompt)
    assert (folder / "megarl_tokenizer.json").is_file()
    assert theirs.config.eos_token_id == 257


def test_a_checkpoint_is_a_model_to_start_from(worlds: Worlds, trained: dict[str, Path], tmp_path: Path) -> None:
    run = trained["TP2xPP2"]
    (checkpoint,) = find(run / "run" / "checkpoints")
    out = tmp_path / "again"
    worlds.run(
        2, run_sft, tmp_path / "run", "trainer.max_steps=1", "optim.lr=0", "data.eval=[]", "parallel.tp=2",
        f"model.path={checkpoint}", f"export.hf={out}",
    )  # fmt: skip
    before, after = stored(run / "exported"), stored(out)
    assert open_source(out).family is open_source(run / "exported").family
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def start(run_dir: Path, *overrides: str) -> None:
    """A run in this process, for what is refused before any other is started."""
    config, _ = compose("sft", [*SMALL, *FIVE, f"run.dir={run_dir}", *overrides])
    train("sft", config)


def test_a_target_that_exists_is_refused_before_training(published: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with refused(CheckpointError, where="there"):
        start(tmp_path / "run", f"model.path={published}", f"export.hf={tmp_path / 'there'}")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        (["data.seq_length=128"], {"key": "data.seq_length", "value": 128, "offers": {"data.seq_length": [64]}}),
        (["trainer.devices=2", "parallel.pp=2", "parallel.vpp=2"], {"names": ("parallel.vpp=2", "model.num_layers=2")}),
    ],
    ids=["length", "layout"],
)
def test_what_does_not_fit_the_published_shape_is_refused(
    overrides: list[str], data: dict[str, Any], published: Path, tmp_path: Path
) -> None:
    with refused(ConfigError, **data):
        start(tmp_path / "run", *overrides, f"model.path={published}")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    save_published("llama", tmp_path / "small")
    with refused(ConfigError, key="model.vocab_size", value=53):
        start(tmp_path / "run", f"model.path={tmp_path / 'small'}")


def test_the_tokenizer_comes_with_the_model(worlds: Worlds, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    save_published("llama", tmp_path / "model")
    words = {"<eos>": 0, "hello": 1, "world": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        tmp_path / "model"
    )
    edit_config(tmp_path / "model", eos_token_id=0)
    (tmp_path / "data.jsonl").write_text('{"prompt": "hello", "completion": "world hello"}\n' * 8)
    worlds.run(
        1, run_sft, tmp_path / "run", *FIVE, f"model.path={tmp_path / 'model'}", f"export.hf={tmp_path / 'out'}",
        f"data.train=[{tmp_path / 'data.jsonl'}]", "trainer.max_steps=1",
    )  # fmt: skip
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("world hello")["input_ids"] == [2, 1]
