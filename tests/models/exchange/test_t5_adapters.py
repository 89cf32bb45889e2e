"""Adapters of T5s: their modules by PEFT's names, the same training in every layout, PEFT's folders in and out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5ForConditionalGeneration

from megarl.config.sections.adapter import AdapterConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.experience.rows import forward_rows, training_flops
from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import for_sampling, switched_off
from megarl.models.exchange.adapters import new_spec, parts_of, targets_of
from megarl.models.exchange.export import export
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.peft import export_adapter, peft_config
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows
from tests.models.adapters import adapted_engine, stir, world_grid
from tests.models.exchange.published import stored
from tests.models.exchange.t5 import VOCAB, make, pairs, rows_of, save, their_logprobs
from tests.parallel.test_engine import merged, whole
from tests.refusals import refused
from tests.worlds import Worlds

GATED = "T5 1.1"
PREFIX = "base_model.model."
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "TP1": (1, {}, "none"),
    "TP1+full": (1, {}, "full"),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}, "none"),
    "PP2": (2, {"pp": 2}, "none"),
    "PP2+full": (2, {"pp": 2}, "full"),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}, "none"),
}
# name: (settings of the adapter, changes of the model)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "dora": ({"kind": "dora"}, {}),
    "cross": ({"kind": "dora", "targets": ["EncDecAttention.k", "EncDecAttention.o", "wi_1"]}, {}),
    "encoder": ({"targets": ["encoder.linear_qkv", "encoder.linear_fc2"]}, {}),
    "last_layers": ({"rslora": True}, {"num_layers_unfrozen": 2}),
    "4bit": ({"base_bits": 4}, {}),
}
CASES = [
    *(("lora", layout) for layout in ("TP1+full", "TP2xPP2")),
    *(("dora", layout) for layout in ("TP2+SP", "PP2")),
    *(("cross", layout) for layout in ("TP2+SP", "PP2+full")),
    *(("encoder", layout) for layout in ("TP2xPP2",)),
    *(("last_layers", layout) for layout in ("TP1+full", "PP2")),
    *(("4bit", layout) for layout in ("TP2+SP",)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 1.1, whose MLP is gated."""
    folder = tmp_path_factory.mktemp("base") / "t5"
    save(GATED, folder)
    return folder


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["T5 1.0", "UL2"])
def test_parts_of_a_layer_are_the_modules_of_encoder_and_decoder(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    source, theirs = open_source(tmp_path), stored(tmp_path)
    assert source.family is not None
    whole_model = parts_of(source.family, source.model)
    seen = set()
    for parts in whole_model.values():
        assert sorted(torch.cat(parts.rows).tolist()) == list(range(parts.count))
        layer = parts.layers[-1]
        mine = source.read(f"decoder.layers.{layer}.{parts.place}.weight")
        for number, rows in enumerate(parts.rows):
            module = parts.module(number, layer)
            assert torch.equal(mine[rows], theirs[f"{module}.weight"]), module
            seen.add(module)
    assert seen == {
        name.removesuffix(".weight")
        for name, tensor in theirs.items()
        if ".block.2." in name and tensor.dim() == 2 and "relative" not in name
    }


ATTENTION = [f"{part}.linear_{name}" for part in ("encoder", "decoder") for name in ("qkv", "proj")]
CROSS = [f"decoder.cross_attention.linear_{name}" for name in ("q", "kv", "proj")]


@pytest.mark.parametrize(
    ("targets", "linears", "names"),
    [
        (["q", "v"], ["decoder.cross_attention.linear_kv", "decoder.cross_attention.linear_q"], ["q", "v"]),
        (["linear_proj"], ["decoder.cross_attention.linear_proj"], ["o"]),
        (["EncDecAttention.q"], ["decoder.cross_attention.linear_q"], ["EncDecAttention.q"]),
        (["linear_fc1"], ["decoder.linear_fc1", "encoder.linear_fc1"], ["wi_0", "wi_1"]),
        (["encoder.linear_fc2"], ["encoder.linear_fc2"], ["1.DenseReluDense.wo"]),
        (["decoder.linear_proj"], ["decoder.linear_proj"], ["decoder.block.{}.layer.0.SelfAttention.o"]),
        (["linear_qkv", "linear_proj", "linear_q", "linear_kv", "wi_0", "wi_1", "wo"], CROSS, ["all-linear"]),
    ],
)
def test_targets_are_our_names_or_those_of_peft(targets: list[str], linears: list[str], names: list[str]) -> None:
    """A run's settings are compared with those of its checkpoint, so the same modules have the same names."""
    model = FAMILIES["t5"].model_config(make(GATED).config.to_dict())
    spec = new_spec(AdapterConfig(targets=targets), model, "t5")
    assert set(linears) <= spec.parts.keys()
    assert targets_of(spec, model) == names
    assert new_spec(AdapterConfig(targets=names), model, "t5") == spec


@pytest.mark.parametrize("target", ["q_proj", "wi", "lm_head", "relative_attention_bias"])
def test_a_target_that_a_t5_lacks_is_refused_with_its_names(target: str) -> None:
    model = FAMILIES["t5"].model_config(make(GATED).config.to_dict())
    names = ("encoder.linear_qkv", "decoder.cross_attention.linear_kv", "wi_0")
    with refused(ConfigError, key="adapter.targets", value=target, names=names):
        new_spec(AdapterConfig(targets=[target]), model, "t5")


def test_layers_without_a_target_are_refused() -> None:
    model = FAMILIES["t5"].model_config(make(GATED).config.to_dict())
    settings = AdapterConfig(targets=["encoder.linear_qkv"])
    assert new_spec(settings, replace(model, num_layers_unfrozen=4), "t5").at(2)
    with refused(ConfigError, key="model.num_layers_unfrozen", value=3):
        new_spec(settings, replace(model, num_layers_unfrozen=3), "t5")


def test_a_t5_without_a_family_has_the_names_of_t5() -> None:
    model = replace(FAMILIES["t5"].model_config(make(GATED).config.to_dict()), norm="layernorm")
    assert new_spec(AdapterConfig(targets=["q"]), model, None).family == "t5"


def test_the_modules_of_some_layers_are_named_one_by_one_for_peft() -> None:
    """PEFT's `layers_to_transform` counts the blocks of encoder and decoder alike."""
    model = FAMILIES["t5"].model_config(make(GATED).config.to_dict())
    everywhere = peft_config(new_spec(AdapterConfig(), model, "t5"), model, None, scores=False)
    assert everywhere["target_modules"] == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]
    assert everywhere["task_type"] == "SEQ_2_SEQ_LM"
    model.num_layers_unfrozen = 4
    last = peft_config(new_spec(AdapterConfig(targets=["SelfAttention.v"]), model, "t5"), model, None, scores=False)
    names = ["encoder.block.2", *(f"decoder.block.{layer}" for layer in range(3))]
    assert last["target_modules"] == [f"{name}.layer.0.SelfAttention.v" for name in names]
    assert last["layers_to_transform"] is None
    part = new_spec(AdapterConfig(targets=["decoder.linear_proj"]), replace(model, num_layers_unfrozen=-1), "t5")
    assert peft_config(part, model, None, scores=False)["target_modules"] == [
        f"decoder.block.{layer}.layer.0.SelfAttention.o" for layer in range(3)
    ]


# --- training ---------------------------------------------------------------------------------------------------------


def logprobs(model: Any, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
    return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}


def computed(engine: Engine, rows: Rows) -> Tensor:
    """The log-prob of every token of responses, [rows, time]."""
    return forward_rows(engine, rows, logprobs, per_microbatch=2, share_bins=True)["logprobs"]


def life(layout: dict[str, Any], recompute: str, kind: str, base: Path) -> dict[str, Any]:
    """Everything that layouts are compared by, on one rank."""
    settings, model = KINDS[kind]
    grid, rows = world_grid(**layout), rows_of(pairs())
    engine = adapted_engine(
        grid, AdapterConfig(**{"rank": 3, "alpha": 6.0, **settings}), model, base, recompute=recompute
    )
    report: dict[str, Any] = {"start": computed(engine, rows)}
    with switched_off(engine.models):
        report["off"] = computed(engine, rows)
    stir(engine)
    report["forward"], report["history"] = computed(engine, rows), []
    with for_sampling(engine.models):
        report["sampling"] = computed(engine, rows)
    report["trained"] = {name for name, parameter in engine.parameters() if parameter.requires_grad}
    for step in range(2):
        batches = make_microbatches(rows, torch.arange(len(rows)), engine, per_microbatch=2, share_bins=True)
        loss = engine.train_step(batches, cross_entropy, count_targets)["loss"]
        if step == 0:
            gradients = whole(engine, lambda one: one.main_grad if one.requires_grad else one)
            report["gradients"] = {name: gradients[name] for name in report["trained"]}
        report["history"].append((loss, engine.apply_gradients()))
    return report


Lives = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lives(worlds: Worlds, base: Path) -> Lives:
    """The reports of all ranks of a kind of adapter in a layout, run once."""
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def of(kind: str, layout: str) -> list[dict[str, Any]]:
        if (kind, layout) not in known:
            size, grid, recompute = LAYOUTS[layout]
            known[kind, layout] = worlds.run(size, life, grid, recompute, kind, base)
        return known[kind, layout]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_trained_ones_do(lives: Lives, kind: str) -> None:
    (report,) = lives(kind, "TP1")
    assert torch.equal(report["start"], report["off"])
    assert float((report["forward"] - report["start"]).abs().max()) > 1e-2
    torch.testing.assert_close(report["sampling"], report["forward"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_layout_trains_alike(lives: Lives, kind: str, layout: str) -> None:
    (wanted,) = lives(kind, "TP1")
    reports = lives(kind, layout)
    for report in reports:
        torch.testing.assert_close(report["forward"], wanted["forward"], rtol=1e-5, atol=1e-5)
        for (loss, norm), (wanted_loss, wanted_norm) in zip(report["history"], wanted["history"], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
    found = merged([report["gradients"] for report in reports])
    assert found.keys() == wanted["gradients"].keys()
    for name, value in wanted["gradients"].items():
        scale = float(value.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale + 1e-8)


def test_adapters_alone_train_in_the_layers_that_are_targets(lives: Lives) -> None:
    def layers(kind: str) -> set[int]:
        trained = lives(kind, "TP1")[0]["trained"]
        assert all(ADAPTER in name for name in trained)
        return {int(name.split(".")[2]) for name in trained}

    assert layers("lora") == layers("cross") == set(range(6))
    assert layers("encoder") == {0, 1, 2}
    assert layers("last_layers") == {4, 5}
    cross = {".".join(name.split(".")[3:5]) for name in lives("cross", "TP1")[0]["trained"]}
    assert cross == {"cross_attention.linear_kv", "cross_attention.linear_proj", "mlp.linear_fc1"}


def test_frozen_weights_beside_adapters_need_no_gradients() -> None:
    """Of one prompt of 5 tokens and a response of 3, in a T5 of 3 + 3 layers, 40 wide, with 6 heads of 12."""
    model = FAMILIES["t5"].model_config(make("T5 1.0").config.to_dict())
    lengths, prompts = torch.tensor([8]), torch.tensor([5])
    own, cross = 4 * 40 * 72 + 2 * 40 * 56, 2 * 40 * 72  # weights of a layer; keys and values, or query and output
    encoder, decoder = 2 * 5 * own, 2 * (3 * (own + cross) + 5 * cross)
    attention, output = (4 * 72 * 5 * 5, 4 * 72 * 3 * (2 + 5)), 2 * 3 * 40 * VOCAB
    factor = 2 * 4 * (40 + 72)  # operations per token of one part of rank 4, from 40 columns to 72 rows or back

    def trained(targets: list[str], unfrozen: int = -1) -> float:
        shape = replace(model, num_layers_unfrozen=unfrozen)
        return training_flops(
            shape, VOCAB, lengths, new_spec(AdapterConfig(rank=4, targets=targets), shape, "t5"), prompts
        )

    both = 2 * 3 * (encoder + decoder) + 3 * 3 * sum(attention) + 2 * output
    assert trained(["EncDecAttention.q"]) == both - 3 * (encoder + 2 * attention[0]) + 3 * 3 * 3 * factor
    assert trained(["EncDecAttention.v"]) == both - 3 * (encoder + 2 * attention[0]) + 3 * 3 * 5 * factor
    assert trained(["encoder.linear_proj"]) == both + 3 * 3 * 5 * factor
    assert trained(["SelfAttention.o"]) == both + 3 * 3 * (5 + 3) * factor
    last = both - 3 * (encoder + 2 * attention[0]) - 2 * (decoder + 2 * attention[1]) + 3 * 3 * factor
    assert trained(["SelfAttention.o"], unfrozen=1) == last


# --- PEFT's folders ---------------------------------------------------------------------------------------------------


def tensors_of(base: Path, modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Random factors of rank 4 for all linear layers whose names end with one of some names."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, weight in stored(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(modules) and weight.dim() == 2:
            found[f"{PREFIX}{module}.lora_A.weight"] = 0.1 * torch.randn(4, weight.shape[1], generator=generator)
            found[f"{PREFIX}{module}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 4, generator=generator)
    return found


def write(folder: Path, base: Path, given: dict[str, Tensor], **config: Any) -> Path:
    """Write a PEFT folder."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 6, "bias": "none"}
    named = {**settings, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    save_file(given, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


EVERY = (".q", ".k", ".v", ".o", ".wi_0", ".wi_1", ".wo")


def merged_by_hand(base: Path, given: dict[str, Tensor]) -> T5ForConditionalGeneration:
    """Transformers' model with scaling * B @ A added to its weights."""
    model = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for name in [name for name in given if "lora_A" in name]:
            weight = model.get_parameter(name.removeprefix(PREFIX).replace(".lora_A", ""))
            weight += 6 / 4 * given[name.replace("lora_A", "lora_B")] @ given[name]
    return model


def both_ways(adapter: Path, base: Path, out: Path, layout: dict[str, Any]) -> dict[str, Tensor]:
    """Log-probs with an adapter beside its base, and merged while it was read; exports the adapter and the model."""
    grid, rows = world_grid(**layout), rows_of(pairs())
    beside = adapted_engine(grid, AdapterConfig(path=str(adapter)), path=base)
    model = open_source(base).model
    export_adapter(beside, out / "again", model=model, base=str(base))
    export(beside, out / "model", model=model, vocab_size=VOCAB, family="t5")
    found = {"beside": computed(beside, rows)}
    return found | {"merged": computed(adapted_engine(grid, None, path=adapter), rows)}


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2"])
def test_an_adapter_of_peft_computes_what_peft_says_and_goes_back_bit_for_bit(
    layout: str, base: Path, worlds: Worlds, tmp_path: Path
) -> None:
    given = tensors_of(base, EVERY)
    assert len(given) == 2 * 3 * (7 + 11)
    adapter = write(tmp_path / "adapter", base, given)
    size, grid, _ = LAYOUTS[layout]
    ranks = worlds.run(size, both_ways, adapter, base, tmp_path, grid)
    theirs, rows = merged_by_hand(base, given), rows_of(pairs())
    exported = T5ForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for row, (prompt, response) in enumerate(pairs()):
        wanted = their_logprobs(theirs, prompt, response)
        assert float((their_logprobs(exported, prompt, response) - wanted).abs().max()) < 1e-4
        for found in ranks:
            for way, values in found.items():
                assert float((values[row][rows.action_mask[row] != 0] - wanted).abs().max()) < 1e-4, way
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name], given[name]) for name in given)


def test_an_adapter_of_the_decoder_alone_is_no_adapter_of_the_last_layers(
    base: Path, worlds: Worlds, tmp_path: Path
) -> None:
    given = {name: tensor for name, tensor in tensors_of(base, EVERY).items() if "decoder" in name}
    source = open_source(write(tmp_path / "adapter", base, given))
    spec = source.adapter.spec  # type: ignore[attr-defined]
    assert (spec.first_layer, spec.first_adapted) == (0, 3)
    assert {name.partition(".")[0] for name in spec.parts} == {"decoder"}
    worlds.run(1, both_ways, tmp_path / "adapter", base, tmp_path, {})
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], given[name]) for name in given)


def test_factors_of_the_last_layers_leave_the_others_without(base: Path, worlds: Worlds, tmp_path: Path) -> None:
    given = {name: tensor for name, tensor in tensors_of(base, (".q",)).items() if "decoder.block.2" in name}
    (found,) = worlds.run(1, adapted_layers, write(tmp_path / "adapter", base, given), base)
    assert found == {5}


def adapted_layers(adapter: Path, base: Path) -> set[int]:
    engine = adapted_engine(world_grid(), AdapterConfig(path=str(adapter)), path=base)
    return {int(name.split(".")[2]) for name, _ in engine.parameters() if ADAPTER in name}


def test_an_adapter_of_another_family_is_refused_with_the_names_of_t5(base: Path, tmp_path: Path) -> None:
    strange = "encoder.block.0.layer.0.SelfAttention.q_proj"
    given = {f"{PREFIX}{strange}.lora_{factor}.weight": torch.zeros(4, 4) for factor in "AB"}
    with refused(CheckpointError, key=strange, names=("wi_0", "wo")):
        open_source(write(tmp_path / "adapter", base, given))
