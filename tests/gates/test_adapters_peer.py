"""LoRA and DoRA beside PEFT, in all families: adapters of PEFT give its logits and merged weights here, ours give
our logits there, and ten AdamW steps from the same adapter give the same losses and gradient norms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.sections.adapter import AdapterConfig
from megarl.models.adapters import for_sampling
from megarl.models.exchange.formats import merged, open_adapter, open_source
from megarl.models.exchange.peft import export_adapter
from megarl.models.exchange.pretrained import OURS
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Rows
from tests.gates.environments import ROOT, run
from tests.models.adapters import adapted_engine, logits, stir, world_grid
from tests.models.exchange.published import save_published
from tests.models.exchange.t5 import save as save_t5
from tests.worlds import Worlds

SCRIPT = ROOT / "tests" / "gates" / "peft_adapters.py"
FAMILIES = {
    "llama": "llama3",
    "mistral": "mistral",
    "qwen2": "qwen2_one_kv_head",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "gptj": "gptj",
    "gpt_neox": "gpt_neox",
    "opt": "opt",
    "t5": "T5 1.0",
    "t5_gated": "T5 1.1",
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}
LOGITS, MERGED, LOSSES = 1e-4, 1e-6, 1e-4
STEPS, ROWS, TIME = 10, 6, 24
OPTIMIZER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_grad": 1.0}

# name: (family, PEFT's configuration) of adapters that do not adapt every linear layer alike
PARTIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
            "alpha_pattern": {"k_proj": 3, "^model.layers.0.mlp.up_proj": 16},
        },
    ),
    "patterns_dora": ("qwen2", {"use_dora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 20}}),
    "patterns_rslora": ("gpt2", {"use_rslora": True, "rank_pattern": {"c_attn": 3}, "alpha_pattern": {"c_fc": 20}}),
    "query_and_value": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "query_and_value_dora": ("opt", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "gate": ("mistral", {"target_modules": ["gate_proj"], "use_dora": True}),
    "last_layer": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "first_layer": ("gpt2", {"layers_to_transform": [0], "target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "other_parts_in_every_layer": (
        "llama",
        {"target_modules": r".*\.0\.self_attn\.q_proj|.*\.1\.self_attn\.v_proj", "use_dora": True},
    ),
    "cross_attention": ("t5", {"target_modules": ["EncDecAttention.k", "EncDecAttention.o"], "use_dora": True}),
    "encoder": ("t5_gated", {"target_modules": r"encoder.*\.(q|wi_1|wo)"}),
    "decoder": ("t5_gated", {"target_modules": r"decoder.*\.(v|o|wi_0)", "use_dora": True}),
    "last_block": ("t5", {"layers_to_transform": [2], "layers_pattern": "block", "target_modules": ["q", "wo"]}),
}
SOME_LAYERS = ("first_layer", "other_parts_in_every_layer", "last_block")
"""Of `PARTIAL`: adapters that are refused beside a base."""


def peft_config(family: str, **changes: Any) -> dict[str, Any]:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    kind = {"task_type": "SEQ_2_SEQ_LM"} if family.startswith("t5") else {}
    return {**settings, **kind, "fan_in_fan_out": family == "gpt2", **changes}


# name: (family, PEFT's configuration)
CASES = {
    **{
        f"{family}-{kind}": (family, peft_config(family, **changes))
        for family in FAMILIES
        for kind, changes in KINDS.items()
    },
    **{name: (family, peft_config(family, **changes)) for name, (family, changes) in PARTIAL.items()},
}
TRAINED = [f"{family}-{kind}" for family in ("llama", "gpt2", "t5_gated") for kind in ("lora", "dora")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of every family, and the tokens that all are given."""
    root = tmp_path_factory.mktemp("adapters")
    for family, name in FAMILIES.items():
        (save_t5 if family.startswith("t5") else save_published)(name, root / "base" / family)
    save_published("llama", root / "base" / "tied", tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(7)
    torch.save(torch.randint(2, 53, (3, 20), generator=generator), root / "tokens.pt")
    torch.save(batches(), root / "batches.pt")
    return root


def batches() -> dict[str, Tensor]:
    """Tokens [steps, rows, time] and which of them are targets: the later half of each row, but for the last few."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(2, 53, (STEPS, ROWS, TIME), generator=generator)
    mask = torch.zeros(STEPS, ROWS, TIME)
    mask[:, :, TIME // 2 :] = 1.0
    mask[:, ::3, -4:] = 0.0
    return {"tokens": tokens, "mask": mask}


def by_peft(python: Path, command: str, cases: list[dict[str, Any]], folder: Path) -> None:
    """Let PEFT make, load or train adapters; see peft_adapters.py."""
    job = folder / f"{command}.json"
    job.write_text(json.dumps(cases))
    run(python, SCRIPT, command, job, cwd=folder, timeout=1800, HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hub"))


def case_of(root: Path, family: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {"base": str(root / "base" / family), "folder": str(folder), "tokens": str(root / "tokens.pt"), **more}


def loaded(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt")


# --- PEFT's adapters here ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(peft_python: Path, root: Path) -> Path:
    """A folder with PEFT's adapter of every case, its logits and its merged weights."""
    cases = [
        case_of(root, family, root / "theirs" / name, config=config, seed=number)
        for number, (name, (family, config)) in enumerate(CASES.items())
    ]
    scores = peft_config("llama", task_type="SEQ_CLS", modules_to_save=["score"])
    cases.append(case_of(root, "llama", root / "theirs" / "scores", config=scores, seed=99, scores=True))
    by_peft(peft_python, "make", cases, root)
    return root / "theirs"


def ours_from(base: Path, adapter: Path, tokens: Tensor, *, whole: bool) -> dict[str, Tensor]:
    """Logits of an adapter of PEFT's that was merged while it was read, and of one beside its base."""
    grid = world_grid()
    stored = open_adapter(adapter)
    source = merged(open_source(base), stored)
    heads = ("score",) if source.heads else ("lm",)
    found = {"merged": logits(adapted_engine(grid, None, path=adapter, heads=heads), tokens)}
    if whole:
        engine = adapted_engine(grid, AdapterConfig(path=str(adapter)), path=base, heads=heads)
        found["beside"] = logits(engine, tokens)
        with for_sampling(engine.models):
            found["sampling"] = logits(engine, tokens)
    return found


@pytest.mark.gate
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_gives_its_logits_and_merged_weights(
    name: str, worlds: Worlds, theirs: Path, root: Path
) -> None:
    family, _ = CASES[name]
    base, adapter, tokens = root / "base" / family, theirs / name, loaded(root, "tokens")
    whole = name not in SOME_LAYERS
    (found,) = worlds.run(1, ours_from, base, adapter, tokens, whole=whole)
    expected = loaded(adapter, "logits")
    for way, values in found.items():
        assert float((values - expected).abs().max()) < LOGITS, way
    source = merged(open_source(base), open_adapter(adapter))
    weights: Mapping[str, Tensor] = loaded(adapter, "merged")
    compared = 0
    for ours, mapped in source.base.mapping.items():  # type: ignore[attr-defined]
        for piece in zip(mapped.theirs, mapped.pieces(source.read(ours)), strict=True):
            stored, view = piece
            if stored in weights:
                compared += 1
                values = view.view.reshape(view.shape)
                assert float((values - weights[stored]).abs().max()) < MERGED, stored
    assert compared > 10
    assert float((expected - logits_of_base(base, tokens, worlds)).abs().max()) > 100 * LOGITS, "the adapter takes part"


def logits_of_base(base: Path, tokens: Tensor, worlds: Worlds) -> Tensor:
    (found,) = worlds.run(1, logits_of, base, tokens)
    return found  # type: ignore[no-any-return]


def logits_of(base: Path, tokens: Tensor) -> Tensor:
    return logits(adapted_engine(world_grid(), None, path=base), tokens)


@pytest.mark.gate
def test_a_reward_models_adapter_of_peft_gives_its_scores(worlds: Worlds, theirs: Path, root: Path) -> None:
    tokens = loaded(root, "tokens")
    (found,) = worlds.run(1, ours_from, root / "base" / "llama", theirs / "scores", tokens, whole=True)
    for way, values in found.items():
        assert values.shape == tokens.shape
        assert float((values - loaded(theirs / "scores", "logits")).abs().max()) < LOGITS, way


# --- ours with PEFT ---------------------------------------------------------------------------------------------------

# name: (family, changes of the model, settings of the adapter)
MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{family}-lora": (family, {}, {"kind": "lora"}) for family in FAMILIES},
    **{f"{family}-dora": (family, {}, {"kind": "dora"}) for family in FAMILIES},
    **{f"{family}-rslora": (family, {}, {"rslora": True}) for family in FAMILIES},
    "tied": ("tied", {}, {"kind": "dora"}),
    "query_and_value": ("llama", {}, {"targets": ["q_proj", "v_proj"]}),
    "our_names": ("llama", {}, {"targets": ["linear_qkv", "down_proj"], "kind": "dora"}),
    "fused": ("gpt_neox", {}, {"targets": ["query_key_value"]}),
    "conv1d": ("gpt2", {}, {"targets": ["attn.c_proj", "c_fc"], "kind": "dora"}),
    "last_layer": ("llama", {"num_layers_unfrozen": 1}, {"kind": "dora"}),
    "last_layer_gpt2": ("gpt2", {"num_layers_unfrozen": 1}, {}),
    "scores": ("llama", {}, {"kind": "lora"}),
    "last_layers_t5": ("t5", {"num_layers_unfrozen": 4}, {"kind": "dora"}),
    "cross_attention": ("t5", {}, {"targets": ["linear_kv", "cross_attention.linear_proj"]}),
    "encoder": ("t5_gated", {}, {"targets": ["encoder.linear_qkv", "wi_1"], "kind": "dora"}),
}


def export_ours(root: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Export a trained-like adapter of every case of `MADE`; return its logits."""
    grid, found = world_grid(), {}
    for name, (family, changes, settings) in MADE.items():
        config = AdapterConfig(**{"rank": 4, "alpha": 6.0, **settings})
        heads = ("score",) if name == "scores" else ("lm",)
        engine = adapted_engine(grid, config, changes, root / "base" / family, heads=heads)
        stir(engine)
        model = open_source(root / "base" / family).model
        shape = {key: changes[key] for key in OURS if key in changes}
        path = str(root / "base" / family)
        export_adapter(engine, root / "ours" / name, model=type(model)(**{**vars(model), **shape}), base=path)
        found[name] = logits(engine, tokens)
    return found


@pytest.fixture(scope="module")
def ours(worlds: Worlds, root: Path, peft_python: Path) -> dict[str, Tensor]:
    """Our logits of every case of `MADE`; PEFT's lie in the folders."""
    (root / "ours").mkdir()
    (found,) = worlds.run(1, export_ours, root, loaded(root, "tokens"))
    cases = [
        case_of(root, family, root / "ours" / name, scores=name == "scores") for name, (family, _, _) in MADE.items()
    ]
    by_peft(peft_python, "load", cases, root)
    return found  # type: ignore[no-any-return]


@pytest.mark.gate
@pytest.mark.parametrize("name", MADE)
def test_peft_computes_our_logits_with_our_adapter(name: str, ours: dict[str, Tensor], root: Path) -> None:
    expected = loaded(root / "ours" / name, "logits")
    found = ours[name]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < LOGITS
    written = json.loads((root / "ours" / name / "adapter_config.json").read_text())
    if name in ("last_layer", "last_layer_gpt2"):
        assert written["layers_to_transform"] == [1]


# --- training ---------------------------------------------------------------------------------------------------------


def train_ours(base: Path, adapter: Path, given: dict[str, Tensor]) -> dict[str, list[float]]:
    """Losses and gradient norms of a step per batch."""
    grid = world_grid()
    settings = AdapterConfig(path=str(adapter))
    engine = adapted_engine(grid, settings, path=base, optim=OPTIMIZER)
    losses, norms = [], []
    for tokens, mask in zip(given["tokens"], given["mask"], strict=True):
        rows = Rows(tokens, torch.full((ROWS,), TIME), mask)
        mine = make_microbatches(rows, torch.arange(ROWS), engine, per_microbatch=2, share_bins=False)
        losses.append(engine.train_step(mine, cross_entropy, count_targets)["loss"])
        norms.append(engine.apply_gradients())
    return {"losses": losses, "norms": norms}


@pytest.fixture(scope="module")
def trained(peft_python: Path, theirs: Path, root: Path) -> Path:
    """A folder with PEFT's losses of training the adapters in it."""
    more = {"batches": str(root / "batches.pt"), "optimizer": OPTIMIZER}
    cases = [case_of(root, CASES[name][0], theirs / name, **more) for name in TRAINED]
    by_peft(peft_python, "train", cases, root)
    return theirs


@pytest.mark.gate
@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_are_those_of_peft(name: str, worlds: Worlds, trained: Path, root: Path) -> None:
    expected = loaded(trained / name, "losses")
    (found,) = worlds.run(1, train_ours, root / "base" / CASES[name][0], trained / name, loaded(root, "batches"))
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSSES)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert abs(found["losses"][-1] - found["losses"][0]) > 100 * LOSSES, "training changes the loss"
