"""Adapters beside frozen weights: their formulas, their parts, and the same training in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import ModelConfig
from megarl.errors import ConfigError
from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import adapted, for_sampling, switched_off
from megarl.models.exchange.adapters import new_spec, parts_of, targets_of
from megarl.models.exchange.formats import open_source
from megarl.models.heads import head_of
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from tests.gated import gated
from tests.models.adapters import SHAPE, adapted_engine, stir, world_grid
from tests.models.exchange.published import save_published, stored
from tests.parallel.engines import batches
from tests.parallel.test_engine import Weights, judge, merged, whole
from tests.refusals import refused
from tests.worlds import Worlds

STEPS = 3
# Biases, one key-value head for two ranks, an embedding that two stages have, two blocks of gate and up.
MODEL = {
    "num_layers": 4,
    "num_kv_heads": 1,
    "tie_embeddings": True,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "activation": "swiglu",
}
SETTINGS = {"rank": 3, "alpha": 6.0}

# name: (processes, layout, recompute)
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "TP1": (1, {}, "none"),
    "TP1+full": (1, {}, "full"),
    "TP2": (2, {"tp": 2}, "none"),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}, "none"),
    "PP2": (2, {"pp": 2}, "none"),
    "PP2+full": (2, {"pp": 2}, "full"),
    "PP2+vpp2": (2, {"pp": 2, "vpp": 2}, "none"),
    "DP2": (2, {}, "none"),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}, "none"),
    "TP2xPP2+SP+full": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, "full"),
}
# name: (settings of the adapter, changes of the model)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "dora": ({"kind": "dora"}, {}),
    "last_layer": ({"targets": ["q_proj", "v_proj", "down_proj"], "kind": "dora"}, {"num_layers_unfrozen": 1}),
    "4bit": ({"base_bits": 4, "kind": "dora"}, {}),
    "8bit": ({"base_bits": 8}, {}),
}
LAYOUTS_OF = {
    "lora": ["TP1+full", "TP2", "PP2", "DP2", "TP2xPP2"],
    "dora": ["TP2+SP", "PP2+vpp2", "TP2xPP2+SP+full"],
    "last_layer": ["TP1+full", "PP2+full", "PP2+vpp2"],
    "4bit": ["TP2+SP"],
    "8bit": ["TP2", "TP2xPP2"],
}
CASES = [(kind, layout) for kind, layouts in LAYOUTS_OF.items() for layout in layouts]
LATER = [("lora", "TP2xPP2"), ("8bit", "TP2xPP2"), ("last_layer", "PP2+vpp2")]


def logprobs(engine: Engine) -> list[Tensor]:
    return [found["logprobs"] for found in engine.forward(batches(engine, 99), judge)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trained_tensors(engine: Engine, pick: Callable[[Tensor], Tensor] = lambda parameter: parameter) -> Weights:
    """This stage's whole tensors that train."""
    trainable = {name for name, parameter in engine.parameters() if parameter.requires_grad}
    found = whole(engine, lambda parameter: pick(parameter) if parameter.requires_grad else parameter)
    return {name: value for name, value in found.items() if name in trainable}


def life(layout: dict[str, Any], recompute: str, kind: str, **changes: Any) -> dict[str, Any]:
    """Everything that layouts are compared by, on one rank."""
    settings, model = KINDS[kind]
    grid = world_grid(**layout)
    config, shape = AdapterConfig(**{**SETTINGS, **settings, **changes}), {**MODEL, **model}
    grid.seed_dropout(5)
    engine = adapted_engine(grid, config, shape, recompute=recompute)
    report: dict[str, Any] = {}
    if config.base_bits == 16:
        base = adapted_engine(grid, None, {**shape, "num_layers_unfrozen": -1}, recompute=recompute)
        before = logprobs(base)
        report["starts_as_base"] = same_bits(logprobs(engine), before)
    else:
        with switched_off(engine.models):
            before = logprobs(engine)
        report["starts_as_base"] = same_bits(logprobs(engine), before)
    report["names"] = {name: parameter.requires_grad for name, parameter in engine.parameters()}
    stir(engine)
    report["forward"] = logprobs(engine)
    frozen = {name: value.detach().clone() for name, value in engine.parameters() if not value.requires_grad}
    history = []
    for step in range(STEPS):
        metrics = engine.train_step(batches(engine, step), cross_entropy, count_targets)
        if step == 0 and grid.layout.dp == 1:
            report["gradients"] = trained_tensors(engine, lambda parameter: parameter.main_grad)
        history.append((metrics["loss"], engine.apply_gradients()))
    report["history"] = history
    report["trained"] = trained_tensors(engine)
    with switched_off(engine.models):
        report["off_as_base"] = same_bits(logprobs(engine), before)
    report["frozen_kept"] = all(torch.equal(dict(engine.parameters())[name], value) for name, value in frozen.items())
    now = logprobs(engine)
    with for_sampling(engine.models):
        sampled = logprobs(engine)
    report["sampling"] = max(float((x - y).abs().max()) for x, y in zip(now, sampled, strict=True))
    report["restored"] = same_bits(logprobs(engine), now) and all(
        torch.equal(dict(engine.parameters())[name], value) for name, value in frozen.items()
    )
    return report


Lives = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lives(worlds: Worlds) -> Lives:
    """The reports of all ranks of a kind of adapter in a layout, run once."""
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def of(kind: str, layout: str) -> list[dict[str, Any]]:
        if (kind, layout) not in known:
            size, grid, recompute = LAYOUTS[layout]
            known[kind, layout] = worlds.run(size, life, grid, recompute, kind)
        return known[kind, layout]

    return of


ALL = [(kind, layout) for kind in KINDS for layout in ("TP1", *LAYOUTS_OF[kind])]


@pytest.mark.parametrize(("kind", "layout"), gated(ALL, LATER))
def test_new_adapters_change_no_bit_and_off_they_leave_none(lives: Lives, kind: str, layout: str) -> None:
    for report in lives(kind, layout):
        assert report["starts_as_base"]
        assert report["off_as_base"]
        assert report["frozen_kept"]


@pytest.mark.parametrize(("kind", "layout"), gated(ALL, LATER))
def test_sampling_with_merged_weights_restores_them_bit_for_bit(lives: Lives, kind: str, layout: str) -> None:
    for report in lives(kind, layout):
        assert report["sampling"] < 1e-5
        assert report["restored"]


@pytest.mark.parametrize(("kind", "layout"), gated(CASES, LATER))
def test_every_layout_trains_alike(lives: Lives, kind: str, layout: str) -> None:
    (wanted,) = lives(kind, "TP1")
    for report in lives(kind, layout):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(report["history"], wanted["history"], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)  # Adam amplifies the last bits


@pytest.mark.parametrize(("kind", "layout"), gated(CASES, LATER))
def test_every_adapter_tensor_has_the_same_gradient_in_every_layout(lives: Lives, kind: str, layout: str) -> None:
    wanted = lives(kind, "TP1")[0]["gradients"]
    found = [report["gradients"] for report in lives(kind, layout) if "gradients" in report]
    assert not found or set().union(*found) == wanted.keys()
    for gradients in found:
        for name, value in gradients.items():
            scale = float(wanted[name].abs().max())
            assert scale > 0, name
            torch.testing.assert_close(
                value, wanted[name], rtol=0, atol=1e-5 * scale + 1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("kind", "layout"), gated(ALL, LATER))
def test_each_adapter_tensor_counts_once_in_the_gradient_norm(lives: Lives, kind: str, layout: str) -> None:
    squares = sum(float(value.double().square().sum()) for value in lives(kind, "TP1")[0]["gradients"].values())
    for report in lives(kind, layout):
        assert report["history"][0][1] == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize(("kind", "layout"), gated(ALL, LATER))
def test_ranks_that_share_an_adapter_tensor_have_the_same_bits_after_training(
    lives: Lives, kind: str, layout: str
) -> None:
    assert (
        merged([report["trained"] for report in lives(kind, layout)]).keys() == lives(kind, "TP1")[0]["trained"].keys()
    )


def test_adapters_alone_train_and_only_in_the_unfrozen_layers(lives: Lives) -> None:
    for kind in KINDS:
        names = lives(kind, "TP1")[0]["names"]
        assert {name for name, trains in names.items() if trains} == {name for name in names if ADAPTER in name}
    layers = {name.split(".")[2] for name in lives("last_layer", "TP1")[0]["names"] if ADAPTER in name}
    assert layers == {"3"}


@pytest.mark.parametrize(("kind", "layout"), [("lora", "TP2"), ("dora", "TP2+SP")])
def test_dropout_has_the_same_masks_where_ranks_share_a_tensor(
    kind: str, layout: str, worlds: Worlds, lives: Lives
) -> None:
    size, grid, recompute = LAYOUTS[layout]
    reports = worlds.run(size, life, grid, recompute, kind, dropout=0.5)
    merged([report["trained"] for report in reports])
    plain = lives(kind, layout)[0]["history"]
    assert abs(reports[0]["history"][0][0] - plain[0][0]) > 1e-5 * plain[0][0] * 10, "dropout takes part"
    assert same_bits(reports[0]["forward"], lives(kind, layout)[0]["forward"]), "no dropout without gradients"


# --- formulas ---------------------------------------------------------------------------------------------------------


def outputs_and_formulas(kind: str, rslora: bool, targets: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each linear layer of the last layer: its output, what the paper's formula gives, and the base's output."""
    config = AdapterConfig(kind=kind, rslora=rslora, targets=targets, rank=3, alpha=5.0)
    engine = adapted_engine(world_grid(), config, MODEL)
    stir(engine)
    found = {}
    scaling = 5.0 / (math.sqrt(3) if rslora else 3)
    family_parts = engine.config.adapter.parts
    for name in family_parts:
        linear = engine.models[0].decoder.layers[-1].get_submodule(family_parts[name].place)
        adapter = linear.adapter
        x = torch.randn(5, 2, linear.weight.shape[1], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output, bias = linear(x)
            weight = linear.weight.detach().clone()
            for number, rows in enumerate(family_parts[name].rows):
                down = adapter.down[3 * number : 3 * number + 3]
                changed = weight[rows] + scaling * adapter.up[rows] @ down
                if kind == "dora":
                    changed = changed * (adapter.magnitude[rows] / changed.norm(dim=1))[:, None]
                weight[rows] = changed
            own = 0 if bias is not None or linear.bias is None else linear.bias
            found[name] = (output, x @ weight.t() + own, x @ linear.weight.t() + own)
    return found


@pytest.mark.parametrize("targets", [["all-linear"], ["k_proj", "up_proj", "o_proj"]], ids=["all", "some"])
@pytest.mark.parametrize(("kind", "rslora"), [("lora", False), ("lora", True), ("dora", False)])
def test_outputs_are_those_of_the_formula(worlds: Worlds, kind: str, rslora: bool, targets: list[str]) -> None:
    (found,) = worlds.run(1, outputs_and_formulas, kind, rslora, targets)
    assert len(found) == (4 if targets == ["all-linear"] else 3)
    for name, (output, formula, plain) in found.items():
        torch.testing.assert_close(output, formula, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert float((formula - plain).abs().max()) > 1e-3, name


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama_tied_one_kv_head", "mistral", "qwen2_window", "qwen3", "gpt2", "gptj", "gpt_neox", "opt"]
)
def test_parts_of_a_layer_are_the_modules_of_the_family(name: str, tmp_path: Path) -> None:
    save_published(name, tmp_path)
    source, theirs = open_source(tmp_path), stored(tmp_path)
    assert source.family is not None
    for parts in parts_of(source.family, source.model).values():
        assert sorted(torch.cat(parts.rows).tolist()) == list(range(parts.count))
        mine = source.read(f"decoder.layers.1.{parts.place}.weight")
        for module, rows in zip(parts.modules, parts.rows, strict=True):
            published = theirs[f"{module.format(1)}.weight"]
            assert torch.equal(mine[rows], published.t() if name == "gpt2" else published), module


def test_a_target_that_matches_nothing_is_refused_with_the_names() -> None:
    model = ModelConfig(**SHAPE)
    names = ("all-linear", "linear_qkv", "q_proj", "gate_proj")
    with refused(ConfigError, key="adapter.targets", value="query_key_value", names=names):
        new_spec(AdapterConfig(targets=["q_proj", "query_key_value"]), model, "llama")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ["all-linear"]),
        (["linear_qkv"], ["k_proj", "q_proj", "v_proj"]),
        (["model.layers.{}.mlp.down_proj", "mlp.down_proj"], ["down_proj"]),
    ],
)
def test_the_same_targets_have_the_same_names(targets: list[str], names: list[str]) -> None:
    """A run's settings are compared with those of its checkpoint."""
    model = ModelConfig(**SHAPE)
    spec = new_spec(AdapterConfig(targets=targets), model, "llama")
    assert targets_of(spec, model) == names
    assert new_spec(AdapterConfig(targets=names), model, "llama") == spec


@pytest.mark.parametrize("target", ["roj", "layers.0.self_attn.q_proj", "lm_head"])
def test_a_part_of_a_name_is_not_a_target(target: str) -> None:
    with refused(ConfigError, key="adapter.targets", value=target):
        new_spec(AdapterConfig(targets=[target]), ModelConfig(**SHAPE), "llama")


# --- several models ---------------------------------------------------------------------------------------------------


def with_critic(bits: int, layout: dict[str, Any]) -> dict[str, Any]:
    """Train a policy whose frozen weights a critic uses too."""
    grid = world_grid(**layout)
    config = AdapterConfig(**SETTINGS, base_bits=bits)
    policy = adapted_engine(grid, config, MODEL)
    critic = adapted_engine(grid, config, MODEL, heads=("value",), name="critic", base=policy)
    mine, theirs = dict(policy.parameters()), dict(critic.parameters())

    def memory(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    together = {name for name in theirs if name in mine and memory(theirs[name]) == memory(mine[name])}
    before = {name: value.detach().clone() for name, value in theirs.items()}
    stir(policy)
    policy.train_step(batches(policy, 0), cross_entropy, count_targets)
    policy.apply_gradients()
    codes = [
        ours.quantised is None or ours.quantised is other.quantised
        for ours, other in zip(adapted(policy.models), adapted(critic.models), strict=True)
    ]
    return {
        "together": together,
        "wanted": {name for name in theirs if ADAPTER not in name and head_of(name) is None},
        "kept": all(torch.equal(theirs[name], value) for name, value in before.items()),
        "quantised": all(codes),
    }


@pytest.mark.parametrize(("bits", "size", "layout"), [(16, 1, {}), (16, 2, {"pp": 2}), (4, 2, {"tp": 2})])
def test_a_critic_uses_the_memory_of_the_policys_frozen_weights(
    bits: int, size: int, layout: dict[str, Any], worlds: Worlds
) -> None:
    for found in worlds.run(size, with_critic, bits, layout):
        assert found["together"] == found["wanted"]
        assert found["kept"]
        assert found["quantised"]
