"""PEFT's folders, written by hand: what is read from them, that writing gives the same bytes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.config.sections.adapter import AdapterConfig
from megarl.errors import CheckpointError, MegarlError, NumericsError
from megarl.models.exchange.formats import merged, open_adapter, open_source
from megarl.models.exchange.peft import export_adapter
from tests.models.adapters import adapted_engine, world_grid
from tests.models.exchange.published import FFN, HIDDEN, save_published, stored
from tests.refusals import refused
from tests.worlds import Worlds

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "use_dora": True,
}
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}  # (rows, columns)
Q, DOWN = (f"{PREFIX}model.layers.0.{module}" for module in SHAPES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_published("llama", folder)
    return folder


def tensors() -> dict[str, Tensor]:
    """The factors of two modules in both layers, rank 4."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in range(2):
        for module, (rows, columns) in SHAPES.items():
            name = f"{PREFIX}model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = 0.2 * torch.randn(4, columns, generator=generator)
            found[f"{name}.lora_B.weight"] = 0.2 * torch.randn(rows, 4, generator=generator)
            found[f"{name}.lora_magnitude_vector"] = 1 + torch.rand(rows, generator=generator)
    return found


def write(folder: Path, base: Path | None, given: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Write a PEFT folder."""
    folder.mkdir(exist_ok=True)
    named = {**CONFIG, "base_model_name_or_path": None if base is None else str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    save_file(tensors() if given is None else given, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def by_hand(weight: Tensor, up: Tensor, down: Tensor, magnitude: Tensor | None, scaling: float) -> Tensor:
    whole = weight + scaling * up @ down
    return whole if magnitude is None else whole * (magnitude / whole.norm(dim=1))[:, None]


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("suffix", ["", ".default"])
def test_an_adapter_is_merged_while_it_is_read(dora: bool, suffix: str, base: Path, tmp_path: Path) -> None:
    """Also with the adapter's name in the tensors' names, as in a state_dict of PEFT's."""
    given = tensors()
    if not dora:
        given = {name: tensor for name, tensor in given.items() if "magnitude" not in name}
    named = {name.replace(".weight", f"{suffix}.weight"): tensor for name, tensor in given.items()}
    source = open_source(write(tmp_path / "adapter", base, named, use_dora=dora))
    assert source.family is not None
    weights, whole = stored(base), source.read("decoder.layers.1.mlp.linear_fc2.weight")
    name = "model.layers.1.mlp.down_proj"
    up, down = (given[f"{PREFIX}{name}.lora_{factor}.weight"] for factor in "BA")
    magnitude = given.get(f"{PREFIX}{name}.lora_magnitude_vector")
    expected = by_hand(weights[f"{name}.weight"], up, down, magnitude, 6 / 4)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    untouched = "decoder.layers.1.self_attention.linear_proj.weight"
    assert torch.equal(source.read(untouched), weights["model.layers.1.self_attn.o_proj.weight"])


def test_modules_may_have_other_ranks_and_scales(base: Path, tmp_path: Path) -> None:
    given = {name: tensor for name, tensor in tensors().items() if "magnitude" not in name}
    given[f"{Q}.lora_A.weight"] = given[f"{Q}.lora_A.weight"][:2].clone()
    given[f"{Q}.lora_B.weight"] = given[f"{Q}.lora_B.weight"][:, :2].clone()
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    source = open_source(write(tmp_path / "adapter", base, given, use_dora=False, **patterns))
    for layer, rank in ((0, 2), (1, 4)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        up, down = (given[f"{PREFIX}{name}.lora_{factor}.weight"] for factor in "BA")
        expected = by_hand(stored(base)[f"{name}.weight"], up, down, None, 5 / rank)
        whole = source.read(f"decoder.layers.{layer}.self_attention.linear_qkv.weight")
        rows = source.adapter.spec.parts["linear_qkv"].rows[0]  # type: ignore[attr-defined]
        torch.testing.assert_close(whole[rows], expected, rtol=0, atol=1e-6)


def test_rows_of_parts_without_factors_in_a_layer_stay(base: Path, tmp_path: Path) -> None:
    """Layer 0 adapts q_proj alone, layer 1 v_proj alone: both are in one of our weights."""
    given = {name.replace("1.self_attn.q_proj", "1.self_attn.v_proj"): tensor for name, tensor in tensors().items()}
    source = open_source(write(tmp_path / "adapter", base, given))
    for layer, kept in ((0, "v_proj"), (1, "q_proj")):
        whole = source.read(f"decoder.layers.{layer}.self_attention.linear_qkv.weight")
        spec = source.adapter.spec.parts["linear_qkv"]  # type: ignore[attr-defined]
        (number,) = (number for number, module in enumerate(spec.modules) if module.endswith(kept))
        assert torch.equal(whole[spec.rows[number]], stored(base)[f"model.layers.{layer}.self_attn.{kept}.weight"])


def exported(adapter: Path, base: Path, folder: Path, layout: dict[str, Any]) -> None:
    grid = world_grid(**layout)
    engine = adapted_engine(grid, AdapterConfig(path=str(adapter)), path=base)
    export_adapter(engine, folder, model=open_source(base).model, base=str(base))


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (4, {"tp": 2, "pp": 2})], ids=["TP1", "TP2xPP2"])
def test_a_round_trip_keeps_every_byte(
    size: int, layout: dict[str, Any], base: Path, worlds: Worlds, tmp_path: Path
) -> None:
    adapter = write(tmp_path / "adapter", base)
    worlds.run(size, exported, adapter, base, tmp_path / "again", layout)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {key: config[key] for key in CONFIG} == {**CONFIG, "target_modules": ["down_proj", "q_proj"]}
    assert config["base_model_name_or_path"] == str(base)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# --- what is refused --------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors().items() if key != name}


# name: (tensors of the file, changes of the configuration, data of the error; see `refused`)
EMBEDDING = f"{PREFIX}model.embed_tokens.lora_embedding_A"
REFUSED: dict[str, tuple[dict[str, Tensor] | None, dict[str, Any], dict[str, Any]]] = {
    "a tensor without a place": (
        {**tensors(), f"{PREFIX}model.layers.0.mlp.router.lora_A.weight": torch.zeros(4, HIDDEN)},
        {},
        {"key": "model.layers.0.mlp.router", "names": ("q_proj", "down_proj")},
    ),
    "a layer too many": (
        {**tensors(), f"{PREFIX}model.layers.2.mlp.down_proj.lora_A.weight": torch.zeros(4, FFN)},
        {},
        {"key": "model.layers.2.mlp.down_proj"},
    ),
    "a trained embedding": (
        {**tensors(), EMBEDDING: torch.zeros(4, 53)},
        {},
        {"key": EMBEDDING.removeprefix(PREFIX)},
    ),
    "a trained output layer": (
        {**tensors(), f"{PREFIX}lm_head.weight": torch.zeros(53, HIDDEN)},
        {"modules_to_save": ["lm_head"]},
        {"key": "lm_head.weight"},
    ),
    "no second factor": (without(f"{Q}.lora_B.weight"), {}, {"key": Q.removeprefix(PREFIX)}),
    "no first factor": (without(f"{Q}.lora_A.weight"), {}, {"key": Q.removeprefix(PREFIX)}),
    "no lengths": (
        without(f"{DOWN}.lora_magnitude_vector"),
        {},
        {"key": DOWN.removeprefix(PREFIX), "names": ("lora_magnitude_vector",)},
    ),
    "another width": (
        {**tensors(), f"{Q}.lora_A.weight": torch.zeros(4, HIDDEN + 1)},
        {},
        {"key": f"{Q}.lora_A.weight", "value": [4, HIDDEN + 1], "names": (str([4, HIDDEN]),)},
    ),
    "another number of rows": (
        {**tensors(), f"{DOWN}.lora_B.weight": torch.zeros(HIDDEN + 1, 4)},
        {},
        {"key": f"{DOWN}.lora_B.weight", "value": [HIDDEN + 1, 4]},
    ),
    "a vector": ({**tensors(), f"{Q}.lora_A.weight": torch.zeros(4)}, {}, {"key": f"{Q}.lora_A.weight"}),
    "no adapter at all": ({"weight": torch.zeros(2)}, {}, {}),
    "biases": (None, {"bias": "lora_only"}, {"key": "bias", "value": "lora_only"}),
    "PiSSA": (None, {"init_lora_weights": "pissa"}, {"key": "init_lora_weights", "value": "pissa"}),
    "another method": (None, {"peft_type": "IA3"}, {"key": "peft_type", "value": "IA3"}),
    "KaSA": (None, {"kasa_config": {"beta": 1}}, {"key": "kasa_config"}),
    "replicated layers": (None, {"layer_replication": [[0, 2]]}, {"key": "layer_replication"}),
    "alpha is a word": (None, {"lora_alpha": "six"}, {"key": "lora_alpha", "value": "six"}),
    "alpha is true": (None, {"lora_alpha": True}, {"key": "lora_alpha", "value": True}),
    "dropout is a list": (None, {"lora_dropout": []}, {"key": "lora_dropout"}),
    "another alpha is a word": (None, {"alpha_pattern": {"q_proj": "x"}}, {"key": "alpha_pattern", "value": "x"}),
    "a pattern is broken": (None, {"alpha_pattern": {"(": 2}}, {"key": "alpha_pattern"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_cannot_be_computed_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    given, changes, data = REFUSED[name]
    folder = write(tmp_path / "adapter", base, given, **changes)
    with refused(CheckpointError, **data) as caught:
        open_source(folder).read("decoder.layers.0.self_attention.linear_qkv.weight")
    assert str(folder) in caught.line


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def half_config(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:40])


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncated, half_config, no_weights])
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", base)
    damage(folder)
    with refused(MegarlError) as caught:
        open_source(folder)
    assert str(folder) in caught.line


def test_a_base_that_is_not_there_is_refused_with_the_way_out(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tmp_path / "gone")
    with refused(CheckpointError, key="adapter", value=str(tmp_path / "gone"), names=(str(folder),)):
        open_source(folder)
    folder = write(tmp_path / "adapter", None)
    with refused(CheckpointError, key="adapter", names=(str(folder),)):
        open_source(folder)
    assert merged(open_source(base), open_adapter(folder)).path == folder


def test_a_folder_without_an_adapter_is_refused(base: Path) -> None:
    with refused(CheckpointError, names=(str(base), "adapter_config.json")):
        open_adapter(base)


def beside(adapter: Path, base: Path) -> MegarlError | None:
    """The error of building an engine with an adapter."""
    try:
        adapted_engine(world_grid(tp=dist.get_world_size()), AdapterConfig(path=str(adapter)), path=base)
    except MegarlError as problem:
        return problem
    return None


def test_values_that_are_not_finite_are_refused_on_every_rank(base: Path, worlds: Worlds, tmp_path: Path) -> None:
    given = tensors()
    given[f"{DOWN}.lora_A.weight"][2, -1] = torch.nan  # a column of the second rank's
    folder = write(tmp_path / "adapter", base, given)
    for error in worlds.run(2, beside, folder, base):
        assert isinstance(error, NumericsError)
        assert error.key is not None
        assert error.key.startswith("decoder.layers.0.mlp.linear_fc2.adapter.down")
        assert str(folder) in str(error)


def test_factors_that_some_layers_lack_are_refused_for_training(base: Path, worlds: Worlds, tmp_path: Path) -> None:
    lacking = "model.layers.1.self_attn.q_proj"
    given = {name: tensor for name, tensor in tensors().items() if lacking not in name}
    folder = write(tmp_path / "adapter", base, given)
    (error,) = worlds.run(1, beside, folder, base)
    assert isinstance(error, CheckpointError)
    assert error.key == lacking
    assert str(folder) in str(error)


def places(adapter: Path, base: Path) -> set[str]:
    """The layers with adapters in an engine that starts from a stored one."""
    engine = adapted_engine(world_grid(), AdapterConfig(path=str(adapter)), path=base)
    return {name.split(".")[2] for name, _ in engine.parameters() if ".adapter." in name}


def test_an_adapter_of_the_last_layers_leaves_the_others_without_one(
    base: Path, worlds: Worlds, tmp_path: Path
) -> None:
    given = {name: tensor for name, tensor in tensors().items() if ".layers.1." in name}
    folder = write(tmp_path / "adapter", base, given, layers_to_transform=[1])
    assert worlds.run(1, places, folder, base) == [{"1"}]
