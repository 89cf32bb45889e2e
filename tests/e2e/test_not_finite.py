"""NaN and infinity end every command with exit code 3 and the name of what holds them, on all ranks, and nothing good
gives way to them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl import convert
from megarl.checkpoint import find, seal, verify
from megarl.config.compose import compose
from megarl.errors import MegarlError, NumericsError
from megarl.generate import work
from tests.e2e.runs import run_ppo, run_sft
from tests.models.exchange.published import save_published
from tests.refusals import assert_refusal
from tests.worlds import Worlds

NORM = "decoder.layers.1.input_layernorm.weight"  # of the second stage, where there are two
TINY = ["model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "trainer.max_steps=2"]
LAYOUTS = {"one": (1, []), "TP2": (2, ["parallel.tp=2"]), "PP2": (2, ["parallel.pp=2"])}


def ended(command: Callable[..., Any], *args: Any) -> MegarlError | None:
    """The error that a command ends with; None where it finishes."""
    try:
        command(*args)
    except MegarlError as problem:
        return problem
    return None


def check(found: list[MegarlError | None], *names: str) -> None:
    """Every rank ends alike, with these names in its line."""
    for error in found:
        assert isinstance(error, NumericsError)
        assert error.exit_code == 3
        assert_refusal(error, names=names)
        assert str(error) == str(found[0])


def spoil(file: Path, name: str, value: float) -> None:
    """Set one number of a stored tensor."""
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def trained(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint in which one weight of a norm is NaN."""
    run_dir = tmp_path_factory.mktemp("trained")
    worlds.run(1, run_sft, run_dir, *TINY)
    folder = find(run_dir / "checkpoints")[-1]
    (shard,) = folder.glob("rank-*.safetensors")
    spoil(shard, f"policy.{NORM}@0", math.nan)
    (folder / "manifest.json").unlink()
    seal(folder, step=2)
    assert verify(folder) is None
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in which one weight of a norm is infinite."""
    folder = tmp_path_factory.mktemp("published") / "llama"
    save_published("llama", folder, vocab_size=300)
    spoil(folder / "model.safetensors", "model.layers.1.input_layernorm.weight", math.inf)
    return folder


def generate(*settings: str) -> None:
    work(
        compose(
            "generate",
            [*settings, "prompts=Hello", "rollout.max_new_tokens=8", "tokenizer.kind=bytes", "trainer.progress=none"],
        )[0]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation_refuses_a_model_of_such_weights(layout: str, worlds: Worlds, trained: Path) -> None:
    world, settings = LAYOUTS[layout]
    check(worlds.run(world, ended, generate, f"model.path={trained}", *settings), str(trained), NORM)


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_training_refuses_to_start_or_go_on_from_such_weights(
    layout: str, worlds: Worlds, trained: Path, tmp_path: Path
) -> None:
    world, settings = LAYOUTS[layout]
    start = [*TINY, *settings, "trainer.max_steps=3"]
    check(worlds.run(world, ended, run_sft, tmp_path / "new", *start, f"model.path={trained}"), str(trained), NORM)
    check(worlds.run(world, ended, run_sft, tmp_path / "on", *start, f"run.resume={trained}"), str(trained), NORM)
    assert find(tmp_path / "new" / "checkpoints") == []


def test_conversion_refuses_such_weights_and_leaves_nothing(trained: Path, published: Path, tmp_path: Path) -> None:
    for origin in (trained, published):
        found = ended(convert.run, [f"from={origin}", f"to={tmp_path / 'new'}"])
        check([found], NORM)
    assert list(tmp_path.iterdir()) == []


def test_a_published_model_of_such_weights_is_refused(worlds: Worlds, published: Path) -> None:
    check(worlds.run(1, ended, generate, f"model.path={published}"), str(published), NORM)


def test_values_beyond_the_runs_precision_are_refused(worlds: Worlds, tmp_path: Path) -> None:
    """float32 reaches a little further than bfloat16 does."""
    save_published("llama", tmp_path / "llama", vocab_size=300)
    name = "model.layers.1.input_layernorm.weight"
    spoil(tmp_path / "llama" / "model.safetensors", name, torch.finfo(torch.float32).max)
    settings = [f"model.path={tmp_path / 'llama'}", "trainer.precision=bf16"]
    check(worlds.run(1, ended, generate, *settings), NORM, "torch.bfloat16")


# --- while a run is under way -----------------------------------------------------------------------------------------


def test_a_learning_rate_that_ruins_the_weights_leaves_the_checkpoints_before_it(
    worlds: Worlds, tmp_path: Path
) -> None:
    kept = ["checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.best.keep=0", "optim.warmup_steps=0"]
    worlds.run(1, run_sft, tmp_path, *TINY, *kept)
    before = {path.name for path in find(tmp_path / "checkpoints")}
    ruin = [*TINY, *kept, "trainer.max_steps=6", "optim.lr=1e30", "checkpoint.keep_last=2"]
    found = worlds.run(2, ended, run_sft, tmp_path, *ruin)
    assert {error.exit_code for error in found} == {3}
    assert_refusal(found[0], names=("optim.lr",))
    assert before <= {path.name for path in find(tmp_path / "checkpoints")}
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["status"] == "failed"


@pytest.mark.parametrize(
    ("key", "settings"),
    [("clone.lr", []), ("critic.separate.lr", ["critic.kind=separate", "clone.data=[]", "ppo.inner_epochs=4"])],
)
def test_the_learning_rate_to_lower_is_that_of_the_engine_that_failed(
    key: str, settings: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    found = worlds.run(1, ended, run_ppo, tmp_path, *settings, f"{key}=1e30", "optim.warmup_steps=0")
    check(found, key)
    assert "optim.lr" not in str(found[0])
