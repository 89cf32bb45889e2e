"""Adapters of mixtures of experts: of attention, of plain MLPs and of shared experts, never of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megarl import convert
from megarl.config.sections.adapter import AdapterConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.models.adapters import frozen_digests
from megarl.models.exchange.adapters import ADAPTER_MODEL, PREFIX, new_spec, parts_of, targets_of
from megarl.models.exchange.export import export
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.formats import merged, open_adapter, open_source
from megarl.models.exchange.peft import export_adapter, peft_config
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.digest import weights_digest
from tests.models.adapters import adapted_engine, stir, world_grid
from tests.models.exchange.experts import KINDS, VOCAB, make, save
from tests.models.exchange.published import stored
from tests.parallel.engines import batches
from tests.refusals import refused
from tests.worlds import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"ep": 2}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2xEP2": (4, {"pp": 2, "ep": 2}),
}
ATTENTION = ["linear_qkv", "linear_proj"]
PLAIN = ["linear_fc1", "linear_fc2"]
SHARED = ["shared_experts.linear_fc1", "shared_experts.linear_fc2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    for kind in KINDS:
        save(kind, root / kind)
    return {kind: root / kind for kind in KINDS}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_modules_outside_of_experts(kind: str, folders: dict[str, Path]) -> None:
    source, theirs = open_source(folders[kind]), stored(folders[kind])
    assert source.family is not None
    seen = set()
    for parts in parts_of(source.family, source.model).values():
        for layer in parts.layers:
            mine = source.read(f"decoder.layers.{layer}.{parts.place}.weight")
            for number, rows in enumerate(parts.rows):
                module = parts.module(number, layer)
                assert torch.equal(mine[rows], theirs[f"{module}.weight"]), module
                seen.add(module)
    inside = ("experts.", ".gate.", "shared_expert_gate", "norm", "embed", "lm_head", "bias")
    assert seen == {name.removesuffix(".weight") for name in theirs if not any(word in name for word in inside)}


@pytest.mark.parametrize(
    ("kind", "targets", "linears", "names"),
    [
        ("mixtral", ["all-linear"], ATTENTION, ["all-linear"]),
        ("qwen3_moe", ["q_proj", "o_proj"], ATTENTION, ["o_proj", "q_proj"]),
        ("qwen2_moe", ["all-linear"], [*ATTENTION, *PLAIN, *SHARED], ["all-linear"]),
        ("qwen2_moe", ["down_proj"], ["linear_fc2", SHARED[1]], ["mlp.down_proj", "shared_expert.down_proj"]),
        ("qwen2_moe", ["shared_expert.up_proj"], SHARED[:1], ["shared_expert.up_proj"]),
        ("qwen2_moe", ["mlp.gate_proj"], PLAIN[:1], ["mlp.gate_proj"]),
        (
            "qwen2_moe",
            ["linear_fc1"],
            ["linear_fc1", SHARED[0]],
            ["mlp.gate_proj", "mlp.up_proj", "shared_expert.gate_proj", "shared_expert.up_proj"],
        ),
    ],
)
def test_targets_name_what_has_adapters(kind: str, targets: list[str], linears: list[str], names: list[str]) -> None:
    model = FAMILIES[kind].model_config(make(kind).config.to_dict())
    spec = new_spec(AdapterConfig(targets=targets), model, kind)
    assert sorted(spec.parts) == sorted(linears)
    assert targets_of(spec, model) == names
    assert new_spec(AdapterConfig(targets=names), model, kind) == spec
    for_peft = peft_config(spec, model, None, scores=False)["target_modules"]
    inside = "model.layers.0.mlp.experts.3"
    assert not [name for name in for_peft if f"{inside}.gate_proj.w1.down_proj".endswith(f".{name}")]


@pytest.mark.parametrize(
    ("kind", "target"),
    [("mixtral", "w1"), ("mixtral", "linear_fc1"), ("qwen3_moe", "gate_proj"), ("qwen3_moe", "linear_fc2")],
)
def test_a_target_that_only_experts_have_is_refused(kind: str, target: str) -> None:
    model = FAMILIES[kind].model_config(make(kind).config.to_dict())
    names = ("experts", kind, "linear_qkv", "q_proj")
    with refused(ConfigError, key="adapter.targets", value=target, names=names):
        new_spec(AdapterConfig(targets=["q_proj", target]), model, kind)


def test_layers_have_what_they_have() -> None:
    model = FAMILIES["qwen2_moe"].model_config(make("qwen2_moe").config.to_dict())
    spec = new_spec(AdapterConfig(), model, "qwen2_moe")
    shared = {f"mlp.{name}" for name in SHARED}
    assert [len(shared & spec.at(layer).keys()) for layer in range(4)] == [2, 0, 2, 2]
    assert ["mlp.linear_fc1" in spec.at(layer) for layer in range(4)] == [False, True, False, False]


def quantised(folder: Path, bits: int) -> ConfigError | None:
    try:
        adapted_engine(world_grid(), AdapterConfig(rank=3, base_bits=bits), path=folder)
    except ConfigError as problem:
        return problem
    return None


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_few_bits_are_refused(bits: int, folders: dict[str, Path], worlds: Worlds) -> None:
    (problem,) = worlds.run(1, quantised, folders["mixtral"], bits)
    with refused(ConfigError, key="adapter.base_bits", value=bits, offers={"adapter.base_bits": [16]}):
        raise problem


# --- training, files --------------------------------------------------------------------------------------------------


def trained(folder: Path, layout: dict[str, Any], out: Path, kind: str = "lora") -> dict[str, Any]:
    """What layouts are compared by; exports the adapter and the merged model."""
    engine = adapted_engine(world_grid(**layout), AdapterConfig(rank=3, kind=kind), path=folder)
    stir(engine)
    model = open_source(folder).model
    export_adapter(engine, out / "adapter", model=model, base=str(folder))
    export(engine, out / "whole", model=model, vocab_size=VOCAB, family=folder.name)
    found: dict[str, Any] = {"frozen": frozen_digests(engine), "digest": weights_digest(engine), "history": []}
    for step in range(2):
        loss = engine.train_step(batches(engine, step), cross_entropy, count_targets)["loss"]
        found["history"].append((loss, engine.apply_gradients()))
    engine.grid.close()
    return found


@pytest.fixture(scope="module")
def alone(
    worlds: Worlds, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder with what one process exports, and what it computes."""
    out = tmp_path_factory.mktemp("alone")
    (found,) = worlds.run(1, trained, folders["qwen2_moe"], {}, out)
    return out, found


def same_tensors(one: Path, other: Path) -> None:
    before, after = load_file(one / ADAPTER_MODEL), load_file(other / ADAPTER_MODEL)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike_and_writes_the_same_adapter(
    layout: str, worlds: Worlds, folders: dict[str, Path], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    size, grid = LAYOUTS[layout]
    for found in worlds.run(size, trained, folders["qwen2_moe"], grid, tmp_path):
        assert found["frozen"] == alone[1]["frozen"]
        assert found["digest"] == alone[1]["digest"]
        for mine, theirs in zip(found["history"], alone[1]["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
    same_tensors(alone[0] / "adapter", tmp_path / "adapter")
    before, after = stored(alone[0] / "whole"), stored(tmp_path / "whole")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)


def test_an_exported_adapter_is_merged_as_peft_does(folders: dict[str, Path], worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, trained, folders["qwen2_moe"], {}, tmp_path, "dora")
    out, base = tmp_path, stored(folders["qwen2_moe"])
    whole, factors = stored(out / "whole"), load_file(out / "adapter" / ADAPTER_MODEL)
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in factors}
    assert {f"{module}.weight" for module in modules} == {
        name for name in base if not torch.equal(base[name], whole[name])
    }
    for module in modules:
        down, up, lengths = (
            factors[f"{PREFIX}{module}.lora_{part}"] for part in ("A.weight", "B.weight", "magnitude_vector")
        )
        weight = base[f"{module}.weight"] + 32 / 3 * up @ down
        wanted: Tensor = weight * (lengths / weight.norm(dim=1))[:, None]
        torch.testing.assert_close(whole[f"{module}.weight"], wanted, rtol=1e-4, atol=1e-5)
    source = merged(open_source(folders["qwen2_moe"]), open_adapter(str(out / "adapter")), None)
    name = "decoder.layers.2.mlp.shared_experts.linear_fc1.weight"
    torch.testing.assert_close(source.read(name), open_source(out / "whole").read(name), rtol=1e-4, atol=1e-5)
    words = [f"from={out / 'adapter'}", f"to={tmp_path / 'again'}", "format=peft"]
    assert convert.run(words) == 0
    same_tensors(out / "adapter", tmp_path / "again")


def test_an_adapter_of_experts_is_refused(
    folders: dict[str, Path], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (alone[0] / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    factors = load_file(adapter / ADAPTER_MODEL)
    module = "model.layers.0.mlp.experts.2.up_proj"
    factors[f"{PREFIX}{module}.lora_A.weight"] = torch.zeros(3, 40)
    factors[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(22, 3)
    save_file(factors, adapter / ADAPTER_MODEL)
    with refused(CheckpointError, key=module, where="adapter", names=("q_proj", "qwen2_moe")):
        merged(open_source(folders["qwen2_moe"]), open_adapter(str(adapter)), None)
