"""Whole SFT runs with other optimizers than AdamW: what a checkpoint contains, exact resume, resume elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.checkpoint import find, tensors
from megarl.errors import CheckpointError
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_sft
from tests.gated import gated
from tests.refusals import refused
from tests.worlds import Worlds

TINY = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "trainer.max_steps=6",
    "checkpoint.every=3",
    "checkpoint.keep_last=9",
    "optim.warmup_steps=2",
]
# name: (settings, moments in a checkpoint; of Muon's matrices, the first alone)
KINDS = {
    "rmsprop": (["optim.kind=rmsprop"], {"exp_avg_sq"}),
    "rmsprop, momentum, bf16": (
        ["optim.kind=rmsprop", "optim.momentum=0.9", "trainer.precision=bf16"],
        {"exp_avg", "exp_avg_sq"},
    ),
    "sgd": (["optim.kind=sgd", "optim.lr=0.1"], set()),
    "sgd, momentum": (["optim.kind=sgd", "optim.lr=0.1", "optim.momentum=0.9"], {"exp_avg"}),
    "lion": (["optim.kind=lion", "optim.lr=2e-4"], {"exp_avg"}),
    "adamw8bit": (["optim.kind=adamw8bit"], {"exp_avg", "exp_avg_sq"}),
    "adamw8bit, bf16": (["optim.kind=adamw8bit", "trainer.precision=bf16"], {"exp_avg", "exp_avg_sq"}),
    "muon": (["optim.kind=muon"], {"exp_avg", "exp_avg_sq"}),
}
LAYOUTS = {"one": (1, []), "TP2": (2, ["parallel.tp=2"]), "PP2": (2, ["parallel.pp=2"])}
# What is more than a number for each weight is cut in every way, the others' moments in one way each.
OTHERS = {
    **{"rmsprop": "TP2", "rmsprop, momentum, bf16": "PP2", "sgd": "one", "sgd, momentum": "TP2", "lion": "PP2"},
    "adamw8bit, bf16": "one",
}
RESUMES = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
RESUMES_LATER = [(kind, layout) for kind, layout in RESUMES if OTHERS.get(kind, layout) != layout]
Run = tuple[Path, list[str], set[str]]
Unbroken = Callable[[str], Run]


@pytest.fixture(scope="module")
def unbroken(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Six steps of a kind over two replicas, with a checkpoint after three: the run's folder, its settings, its
    moments."""
    known: dict[str, Run] = {}

    def of(kind: str) -> Run:
        if kind not in known:
            settings, moments = KINDS[kind]
            known[kind] = tmp_path_factory.mktemp("unbroken"), [*TINY, *settings], moments
            worlds.run(2, run_sft, known[kind][0], *known[kind][1])
        return known[kind]

    return of


ROUNDED = "were rounded again"


def log_of(run_dir: Path) -> str:
    """What the first rank logged."""
    return (run_dir / "logs" / "rank-0000.log").read_text()


def half(run_dir: Path) -> Path:
    return find(run_dir / "checkpoints")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_contains_the_states_that_the_kind_has(kind: str, unbroken: Unbroken) -> None:
    run_dir, settings, moments = unbroken(kind)
    saved = tensors(half(run_dir))
    found = {match[1] for name in saved if (match := re.search(r"\.optimizer\.state\.(\w+?)\.", name))}
    assert found == {"param", *moments}
    weights = {name for name in saved if ".optimizer." not in name}
    for state in found:
        there = f".optimizer.state.{state}."
        without = in_layers(weights) if "optim.kind=muon" in settings and state == "exp_avg_sq" else set()
        assert {name.replace(there, ".") for name in saved if there in name} == weights - without
    assert all(saved[name].any() for name in saved if ".state.exp_avg" in name)


def in_layers(names: set[str]) -> set[str]:
    """The matrices of the layers."""
    found = {name for name in names if ".layers." in name and name.endswith(".weight") and "norm" not in name}
    assert len(found) == 8
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_ends_in_the_same_bits(kind: str, worlds: Worlds, unbroken: Unbroken, tmp_path: Path) -> None:
    run_dir, settings, _ = unbroken(kind)
    worlds.run(2, run_sft, tmp_path, *settings, f"run.resume={half(run_dir)}")
    assert_same_bits(final_tensors(tmp_path), final_tensors(run_dir))
    assert ROUNDED not in log_of(tmp_path)


@pytest.mark.parametrize(("kind", "layout"), gated(RESUMES, RESUMES_LATER))
def test_a_checkpoint_resumes_in_another_layout(
    kind: str, layout: str, worlds: Worlds, unbroken: Unbroken, tmp_path: Path
) -> None:
    run_dir, settings, _ = unbroken(kind)
    world, overrides = LAYOUTS[layout]
    worlds.run(world, run_sft, tmp_path, *settings, *overrides, f"run.resume={half(run_dir)}")
    ours, theirs = (metrics(folder, "train/loss", "train/grad_norm") for folder in (tmp_path, run_dir))
    eight_bits = "optim.kind=adamw8bit" in settings
    rounding = 1e-2 if "trainer.precision=bf16" in settings else 2e-3 if eight_bits else 1e-4
    # Of so small a model, the parts of one replica, and of a stage, begin where blocks of two replicas' parts did.
    assert log_of(tmp_path).count(ROUNDED) == (eight_bits and layout == "TP2")
    assert len(ours) == 3
    for found, wanted in zip(ours, theirs[3:], strict=True):
        assert found == pytest.approx(wanted, rel=rounding)


@pytest.fixture(scope="module")
def with_rmsprop(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rmsprop")
    worlds.run(1, run_sft, run_dir, *TINY, "optim.kind=rmsprop", "trainer.max_steps=1")
    return run_dir


@pytest.mark.parametrize(
    ("other", "key", "old", "new"),
    [
        (["optim.kind=adamw"], "optim.kind", "rmsprop", "adamw"),
        (["optim.kind=rmsprop", "optim.momentum=0.5"], "optim.momentum", 0.0, 0.5),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    other: list[str], key: str, old: object, new: object, worlds: Worlds, with_rmsprop: Path, tmp_path: Path
) -> None:
    where = str(half(with_rmsprop))
    with refused(CheckpointError, key=key, value=new, where=where, offers={key: [old]}):
        worlds.run(1, run_sft, tmp_path, *TINY, *other, f"run.resume={with_rmsprop / 'checkpoints'}")
