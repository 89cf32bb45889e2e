"""What a checkpoint says of its model and of its parts is believed only as far as it can be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.checkpoint import COMMON, INDEX, MANIFEST, plain_content, seal, verify
from megarl.config.sections.model import ModelConfig, RopeScalingConfig
from megarl.disk import shown
from megarl.errors import CheckpointError
from megarl.models.exchange.checkpoints import FILE, write_checkpoint
from megarl.models.exchange.formats import open_source
from megarl.parallel.shards import Part
from tests.models.exchange.published import save_published
from tests.models.exchange.refusal import assert_not_opened
from tests.refusals import refused

WORDS = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    save_published("llama3", root / "model")
    write_checkpoint(open_source(root / "model"), root / "checkpoint")
    return root / "checkpoint"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def sealed(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    seal(folder, step=0)
    assert verify(folder) is None


def with_common(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    common = torch.load(folder / COMMON, weights_only=True)
    changed = change(common)
    torch.save(common if changed is None else changed, folder / COMMON)
    sealed(folder)


def with_index(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["parts"])
    (folder / INDEX).write_text(json.dumps(index))
    sealed(folder)


@pytest.mark.parametrize("card", [torch.ones(3), [], "gpt", {"config": None}])
def test_a_card_that_describes_no_model_is_refused(card: Any, checkpoint: Path) -> None:
    with_common(checkpoint, lambda common: {**common, "model": card})
    with refused(CheckpointError, key="model", names=(str(checkpoint),)):
        open_source(checkpoint)


@pytest.mark.parametrize(
    "moments", [3, [], [1.0], [1.0, 0.0], [1.0, -2.0], [float("nan"), 1.0], [0.0, 10**400], ["0", "1"], [True, 1.0]]
)
def test_moments_of_scores_that_are_none_are_refused(moments: Any, checkpoint: Path) -> None:
    with_common(checkpoint, lambda common: {**common, "model": {**common["model"], "score_moments": moments}})
    with refused(CheckpointError, key="score_mean"):
        open_source(checkpoint)


@pytest.mark.parametrize("key", ["new_key", "num_experts", "x" * 500])
def test_a_key_of_a_later_version_is_named(key: str, checkpoint: Path) -> None:
    with_common(checkpoint, lambda common: common["model"]["config"].update({key: 1}))
    assert_not_opened(checkpoint, key=f"model.{shown(key)}", value=1, where="checkpoint")


@pytest.mark.parametrize("key", ["sliding_window", "init_std", "parallel_residual"])
def test_a_key_that_an_older_version_did_not_have_is_at_its_default(key: str, checkpoint: Path) -> None:
    with_common(checkpoint, lambda common: common["model"]["config"].pop(key) and None)
    assert getattr(open_source(checkpoint).model, key) == getattr(ModelConfig(), key)


def flat_rope(**keys: Any) -> Callable[[dict[str, Any]], None]:
    """Write the scaling of rotary positions as a card had it before it was a section."""

    def change(common: dict[str, Any]) -> None:
        config = common["model"]["config"]
        scaling = config.pop("rope_scaling")
        config["rope_scaling"] = scaling.pop("kind")
        config |= {f"rope_{name}": value for name, value in scaling.items()} | keys

    return change


def test_the_scaling_of_rotary_positions_in_an_older_card_is_read(checkpoint: Path) -> None:
    model = open_source(checkpoint).model
    assert model.rope_scaling is not None
    assert model.rope_scaling != RopeScalingConfig("llama3")
    with_common(checkpoint, flat_rope())
    config = plain_content(checkpoint)[0]["model"]["config"]
    assert (config["rope_scaling"], config["rope_factor"]) == ("llama3", model.rope_scaling.factor)
    assert open_source(checkpoint).model == model


def test_an_older_card_without_scaled_rotary_positions_is_read(checkpoint: Path) -> None:
    with_common(checkpoint, flat_rope(rope_scaling="none"))
    assert open_source(checkpoint).model.rope_scaling is None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (flat_rope(rope_factor="two"), "model.rope_scaling.factor"),
        (flat_rope(rope_scaling="longrope"), "model.rope_scaling.kind"),
        (flat_rope(rope_scaling=5), "model.rope_scaling.kind"),
        (flat_rope(rope_original_positions=None), "model.rope_scaling.original_positions"),
        (lambda common: common["model"]["config"].update(rope_scaling=5), "model.rope_scaling"),
        (lambda common: common["model"]["config"]["rope_scaling"].update(kind=5), "model.rope_scaling.kind"),
        (lambda common: common["model"]["config"]["rope_scaling"].update(turns=5), "model.rope_scaling.turns"),
    ],
)
def test_a_scaling_of_rotary_positions_that_cannot_be_is_refused_by_its_key(
    change: Any, key: str, checkpoint: Path
) -> None:
    with_common(checkpoint, change)
    assert_not_opened(checkpoint, key=key, where="checkpoint")


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda common: [1], {"key": COMMON}),
        (lambda common: common.update(sharded_common=3), {"key": COMMON}),
        (lambda common: common.update(model=3), {"key": "model", "value": 3}),
        (lambda common: common.update(model={}), {"key": "model", "value": None}),
        (lambda common: common.update(model={"config": [1]}), {"key": "model", "value": {"config": [1]}}),
        (lambda common: common["model"]["config"].update(num_layers="two"), {"names": ("model.num_layers",)}),
        (lambda common: common["model"]["config"].update(num_layers=10**9), {"names": ("model.num_layers",)}),
        (lambda common: common["model"]["config"].update(num_kv_heads=3), {"names": ("model.num_kv_heads",)}),
        (lambda common: common["model"]["config"].update(hidden_size=64), {"key": WORDS, "value": [56, 32]}),
        (lambda common: common["model"].update(vocab_size=None), {"key": "vocab_size", "value": None}),
        (lambda common: common["model"].update(vocab_size=10**6), {"key": WORDS, "value": [56, 32]}),
        (lambda common: common["model"].update(tokenizer=[1]), {"key": "tokenizer", "value": [1]}),
        (
            lambda common: common["model"].update(tokenizer={"kind": "none"}),
            {"key": "tokenizer", "value": {"kind": "none"}},
        ),
    ],
)
def test_plain_values_of_a_wrong_kind_are_refused(change: Any, data: dict[str, Any], checkpoint: Path) -> None:
    with_common(checkpoint, change)
    assert_not_opened(checkpoint, where=str(checkpoint), **data)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.update(file="../other.safetensors"),
        lambda part: part.update(file="/etc/passwd"),
        lambda part: part.update(file=".."),
        lambda part: part.update(file=""),
        lambda part: part.update(file="unlisted.safetensors"),
        lambda part: part.update(offset=[-1] * len(part["offset"])),
        lambda part: part.update(offset=[10**6] * len(part["offset"])),
        lambda part: part.update(shape=[1.5] * len(part["shape"])),
        lambda part: part.update(shape=[]),
        lambda part: part.update(tensor_shape="ab"),
        lambda part: part.update(dtype="nn"),
        lambda part: part.update(key=None),
        lambda part: part.update(more=1),
        lambda part: part.clear(),
    ],
)
def test_an_index_that_cannot_be_is_refused(change: Any, checkpoint: Path) -> None:
    with_index(checkpoint, lambda parts: change(parts[0]))
    assert_not_opened(checkpoint, where=str(checkpoint))


def test_an_index_that_leaves_out_a_part_is_refused(checkpoint: Path) -> None:
    with_index(checkpoint, lambda parts: parts.__setitem__(0, {**parts[0], "shape": [1, *parts[0]["shape"][1:]]}))
    assert_not_opened(checkpoint, key=f"policy.{WORDS}", where=str(checkpoint))


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"parts": 3}', '{"parts": [3]}', "[" * 100_000])
def test_an_index_of_another_kind_is_refused(text: str, checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text(text)
    sealed(checkpoint)
    assert_not_opened(checkpoint, key=INDEX, where=str(checkpoint))


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '{"format": 1, "files": {"../x": [1, 2]}}', "9" * 5000])
def test_a_manifest_of_another_kind_is_not_whole(text: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(text)
    problem = verify(checkpoint)
    assert problem is not None
    assert "\n" not in str(problem)
    assert_not_opened(checkpoint, where=str(checkpoint))


def test_a_shard_whose_tensors_are_not_as_the_index_says_is_refused_when_read(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / FILE)
    name = next(name for name in tensors if "final_layernorm" in name)
    save_file({**tensors, name: tensors[name][:-1].clone()}, checkpoint / FILE)
    sealed(checkpoint)
    with refused(CheckpointError, where=FILE):
        open_source(checkpoint).read("decoder.final_layernorm.weight")


def test_a_part_is_described_as_it_was(saved: Path) -> None:
    _, parts = plain_content(saved)
    assert [Part.from_json(part.to_json()) for part in parts] == parts  # as a rank reports it
    assert [Part.from_json(json.loads(json.dumps(part.to_json()))) for part in parts] == parts
