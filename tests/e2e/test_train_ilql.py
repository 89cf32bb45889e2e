"""Whole ILQL runs: every loss term the same in every layout, exact resume with targets, heads in and out, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megarl import generate
from megarl.checkpoint import find, tensors
from megarl.config.compose import compose
from megarl.config.rules import check
from megarl.errors import ConfigError, DataError
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.source import HEADS
from tests.e2e.runs import OFFLINE_WALKS, assert_same_bits, composed, final_tensors, launched, metrics, run_ilql
from tests.gated import gated
from tests.refusals import refused
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2+SP": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, ["trainer.micro_batch_size=3"]),
    "rows of their own": (1, ["ilql.pack=false"]),
}
TERMS = ("loss", "loss_q", "loss_v", "loss_cql", "loss_awac", "q", "v")
STEPS = 12
HALF = STEPS // 2
EVALUATED = [f"trainer.eval_every={STEPS}", "eval.sweep.beta=[0,50]", "rollout.temperature=0"]


@pytest.fixture(scope="module")
def reference(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, a checkpoint half-way, a greedy evaluation before and after, exported at the end."""
    run_dir = tmp_path_factory.mktemp("reference")
    worlds.run(
        *(1, run_ilql, run_dir, *EVALUATED, f"checkpoint.every={HALF}", "checkpoint.keep_last=3"),
        f"export.hf={run_dir / 'exported'}",
    )
    return run_dir


def close(a: float, b: float, relative: float) -> bool:
    return abs(a - b) <= relative * abs(b) + 1e-6


def assert_same_course(run_dir: Path, reference: Path, first: int = 0) -> None:
    names = [*(f"train/{term}" for term in TERMS), "train/grad_norm"]
    ours, theirs = metrics(run_dir, *names), metrics(reference, *names)[first:]
    assert len(ours) == len(theirs) == STEPS - first
    for step, (mine, wanted) in enumerate(zip(ours, theirs, strict=True), first + 1):
        for name, value, want in zip(names, mine, wanted, strict=True):
            assert close(value, want, 1e-4 if name == "train/grad_norm" else 1e-5), f"{name} at step {step}"


def samples(run_dir: Path) -> list[tuple[str, str, str]]:
    """Setting, prompt and greedy response of each that an evaluation showed."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [(row["setting"], row["prompt"], row["response"]) for row in rows]


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2", "PP2"]))
def test_layouts_train_and_generate_alike(layout: str, worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    lean = ["metric.fn=null", "checkpoint.save_last=false", "checkpoint.best.keep=0"]
    worlds.run(world, run_ilql, tmp_path, *overrides, *EVALUATED, *lean)
    assert_same_course(tmp_path, reference)
    assert samples(tmp_path) == samples(reference)


def test_it_learns_and_the_best_checkpoint_is_kept(reference: Path) -> None:
    course = metrics(reference, "train/loss", "train/loss_awac")
    assert sum(course[-1]) < sum(course[0])
    summary = json.loads((reference / "summary.json").read_text())
    assert {"eval/optimality@beta=0", "eval/optimality@beta=50"} <= summary["metrics"].keys()
    assert summary["status"] == "finished"
    shown = samples(reference)
    with_values = [row[1:] for row in shown if row[0] == "beta=50"]
    assert with_values
    assert with_values != [row[1:] for row in shown if row[0] == "beta=0"]


def test_a_run_cut_in_two_ends_in_the_same_weights(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    """Cut at 7, between two moves of the targets."""
    cut = tmp_path / "cut"
    worlds.run(1, run_ilql, cut, "trainer.max_steps=7")
    resumed = tmp_path / "resumed"
    worlds.run(1, run_ilql, resumed, f"run.resume={cut / 'checkpoints'}")
    ours, theirs = final_tensors(resumed), final_tensors(reference)
    assert any(key.startswith("policy.target_q_heads.1.outer") for key in theirs)
    assert_same_bits(ours, theirs)
    assert_same_course(resumed, reference, first=7)


@pytest.mark.parametrize("layout", gated(["PP2", "TP2xPP2+SP"], ["TP2xPP2+SP"]))
def test_a_checkpoint_resumes_in_another_layout(layout: str, worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    half = reference / "checkpoints" / f"step-{HALF:07}"
    worlds.run(world, run_ilql, tmp_path, *overrides, f"run.resume={half}")
    assert_same_course(tmp_path, reference, first=HALF)


def test_targets_move_every_so_many_steps_of_the_run(worlds: Worlds, tmp_path: Path) -> None:
    """With alpha 1 the targets are the Q heads of the last move: of step 2 after 3 steps, cut there or not."""
    keep = ["ilql.target_every=2", "ilql.target_alpha=1", "checkpoint.every=1", "checkpoint.keep_last=20"]
    worlds.run(1, run_ilql, tmp_path, *keep, "trainer.max_steps=3")
    worlds.run(1, run_ilql, tmp_path, *keep, "trainer.max_steps=5")
    by_step = {int(path.name.rpartition("-")[2]): tensors(path) for path in find(tmp_path / "checkpoints")}
    name = "q_heads.0.inner.weight"
    for step in range(1, 6):
        target = by_step[step][f"policy.target_{name}"]
        moved = step // 2 * 2
        if moved:
            assert torch.equal(target, by_step[moved][f"policy.{name}"]), step
        else:
            assert not torch.equal(target, by_step[step][f"policy.{name}"]), step


def test_heads_survive_export_and_import(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    exported, final = reference / "exported", final_tensors(reference)
    heads = load_file(exported / HEADS)
    assert {name.split(".")[0] for name in heads} == {"value_head", "q_heads", "target_q_heads"}
    assert all(torch.equal(value, final[f"policy.{name}"]) for name, value in heads.items())
    # At lr 0 a run ends with what it was given; with alpha so small the targets keep theirs as well.
    still = ["optim.lr=0", "trainer.max_steps=1", "model.path=" + str(exported), "parallel.tp=2"]
    worlds.run(2, run_ilql, tmp_path, *still)
    back = final_tensors(tmp_path)
    names = [name for name in final if "optimizer" not in name]
    assert_same_bits({name: final[name] for name in names}, {name: back[name] for name in names})
    assert open_source(find(tmp_path / "checkpoints")[-1]).heads.keys() == heads.keys()


def answers(model: Path, out: Path, *overrides: str) -> None:
    prompts = out.with_suffix(".prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": letter}) + "\n" for letter in "bcdefgh"))
    settings = [f"model.path={model}", f"prompts={prompts}", f"out={out}", "rollout.max_new_tokens=9"]
    with launched():
        generate.work(composed("generate", [*settings, "rollout.temperature=0", "trainer.progress=none", *overrides]))


def test_generate_takes_the_checkpoint_and_is_guided(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    checkpoint = reference / "checkpoints" / f"step-{STEPS:07}"
    for name, beta in (("guided", 50), ("plain", 0)):
        worlds.run(1, answers, checkpoint, tmp_path / f"{name}.jsonl", f"rollout.ilql_beta={beta}")
    texts = {
        name: {row["prompt"]: row["response"] for row in map(json.loads, (tmp_path / f"{name}.jsonl").open())}
        for name in ("guided", "plain")
    }
    last = samples(reference)[-8:]
    for setting, prompt, response in last:
        assert texts["guided" if setting == "beta=50" else "plain"][prompt] == response
    assert texts["guided"] != texts["plain"]


def test_one_q_head_is_enough(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, run_ilql, tmp_path, "ilql.two_qs=false", "trainer.max_steps=2")
    heads = {name.split(".")[2] for name in final_tensors(tmp_path) if name.startswith("policy.q_heads")}
    assert heads == {"0"}


def test_a_graph_whose_goal_cannot_be_reached_trains_without_nan(worlds: Worlds, tmp_path: Path) -> None:
    """All rewards are equal."""
    worlds.run(1, run_ilql, tmp_path, "data.options.seed=1001", "trainer.max_steps=5")
    for values in metrics(tmp_path, "train/loss", "train/loss_q", "train/grad_norm"):
        assert all(value == value for value in values)


def test_a_broken_record_is_named_by_file_and_line(worlds: Worlds, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"samples": ["a", "b"], "rewards": 1}\n{"samples": ["a", "b"], "rewards": "much"}\n')
    with refused(DataError, names=(f"{data}:2", "rewards", "'much'")):
        worlds.run(1, run_ilql, tmp_path / "run", f"data.train=[{data}]", "data.cache=null")


@pytest.mark.parametrize(
    ("override", "key", "value", "name"),
    [
        ("eval.sweep.temperature=[0.5]", "eval.sweep.temperature", [0.5], "eval.sweep.beta"),
        ("rollout.max_new_tokens=16", "rollout.max_new_tokens", 16, "model.max_positions=16"),
        ("ilql.tau=1", "ilql.tau", 1.0, "ilql.tau=1.0"),
        ("data.train=[]", "data.train", [], "data.train"),
        ("data.seq_length=17", "data.seq_length", 17, "model.max_positions=16"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(
    override: str, key: str, value: Any, name: str
) -> None:
    with refused(ConfigError, key=key, value=value, names=(name,)):
        check(compose("ilql", [*OFFLINE_WALKS, override])[0], world_size=1)
