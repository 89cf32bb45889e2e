"""Reward models beside TRL's RewardTrainer: the same weights, tokens, batches and optimizer give the same losses,
gradient norms, accuracies and scores in every one of ten steps."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import metrics
from tests.gates.test_preference_peer import (
    LOSS_TOLERANCE,
    OURS,
    STEPS,
    THEIRS,
    VOCABULARY,
    pairs,
    run_trl,
    save_tokenizer,
    train,
    write_records,
)
from tests.worlds import Worlds

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 64, "max_positions": 96}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "num_kv_heads": 2},
    "gpt2": {
        **SHAPE,
        **{"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "tie_embeddings": True},
        **{"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    },
}
# TRL's name: ours.
NAMES = {"grad_norm": "grad_norm", "accuracy": "accuracy", "margin": "margin", "mean_reward": "score"}


@dataclass(frozen=True)
class Case:
    """A model and settings on both sides."""

    model: str
    data: str = "pairs"
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)


CENTERED: tuple[dict[str, Any], list[str]] = ({"center_rewards_coefficient": 0.1}, ["rm.center_coef=0.1"])
CASES = {
    "llama": Case("llama"),
    "llama_margins": Case("llama", "margins"),
    "llama_centered": Case("llama", "pairs", *CENTERED),
    "llama_margins_centered_smaller_microbatches": Case(
        "llama", "margins", CENTERED[0], [*CENTERED[1], "trainer.micro_batch_size=2"]
    ),
    "gpt2_margins_centered": Case("gpt2", "margins", *CENTERED),
}


def with_margins() -> list[dict[str, Any]]:
    generator = random.Random(8)
    return [{**pair, "margin": generator.choice((0.0, 0.25, 1.5))} for pair in pairs()]


def export_models(folder: Path) -> None:
    """Random reward models as folders of transformers, each with a tokenizer whose padding is not its EOS."""
    from megarl.config.sections.model import ModelConfig
    from megarl.config.sections.parallel import ParallelConfig
    from megarl.models.build import build_engine
    from megarl.models.exchange.export import export
    from megarl.models.roles import Role
    from megarl.parallel.grid import Grid, start_world
    from megarl.parallel.layout import Layout

    for name, shape in MODELS.items():
        grid, model = Grid(Layout(), start_world()), ModelConfig(**shape)
        engine = build_engine(
            Role("policy", model, VOCABULARY, ("score",)), grid, ParallelConfig(), precision="fp32", seed=3
        )
        export(engine, folder / name, model=model, vocab_size=VOCABULARY, family=name)
        save_tokenizer(folder / name)
        grid.close()


@pytest.fixture(scope="module")
def models(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    worlds.run(1, export_models, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "pairs": write_records(folder / "pairs.jsonl", pairs()),
        "margins": write_records(folder / "margins.jsonl", with_margins()),
    }


@pytest.fixture(scope="module")
def theirs(
    trl_python: Path, models: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, float]]]:
    """Metrics of all cases under TRL."""
    cases = {
        name: {"trainer": "Reward", "model": str(models / case.model), "data": case.data, "settings": case.theirs}
        for name, case in CASES.items()
    }
    files = {name: str(path) for name, path in data.items()}
    job = {"model": str(models / "llama"), "data": files, "common": THEIRS, "cases": cases}
    return run_trl(trl_python, job, tmp_path_factory.mktemp("theirs"))


@pytest.mark.gate
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_trl(
    name: str,
    worlds: Worlds,
    theirs: dict[str, list[dict[str, float]]],
    models: Path,
    data: dict[str, Path],
    tmp_path: Path,
) -> None:
    case, expected = CASES[name], theirs[name]
    files = [f"model.path={models / case.model}", f"data.train=[{data[case.data]}]", f"run.dir={tmp_path}/run"]
    worlds.run(1, train, "rm", [*OURS, *files, *case.ours])
    rows = metrics(tmp_path / "run", "train/loss", *(f"train/{ours}" for ours in NAMES.values()))
    assert len(rows) == len(expected) == STEPS
    losses = [row[0] for row in rows]
    gap = max(abs(row[0] / step["loss"] - 1) for row, step in zip(rows, expected, strict=True))
    print(f"{name}: losses {losses[0]:.6f} to {losses[-1]:.6f}, largest relative difference {gap:.1e}")  # noqa: T201
    assert losses == pytest.approx([step["loss"] for step in expected], rel=LOSS_TOLERANCE)
    assert max(losses) - min(losses) > 100 * LOSS_TOLERANCE * abs(losses[0]), "training changes the loss"
    for column, their_name in enumerate(NAMES, 1):
        values = [row[column] for row in rows]
        assert values == pytest.approx([step[their_name] for step in expected], rel=1e-3, abs=1e-4), their_name
