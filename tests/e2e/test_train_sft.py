"""Whole SFT runs: the same numbers in every layout, exact resume, resume elsewhere, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megarl.checkpoint import MANIFEST, find, plain_content, tensors
from megarl.errors import CheckpointError, DataError
from tests.e2e.runs import SMALL, assert_same_bits, final_tensors, metrics, run_sft
from tests.gated import gated
from tests.programs import Program
from tests.refusals import refused
from tests.report.parsed import parse
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "interleaved PP2": (2, ["parallel.pp=2", "parallel.vpp=2", "trainer.micro_batch_size=2"]),
    "DP2": (2, ["trainer.micro_batch_size=2"]),
    "TP2+SP": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "TP2xDP2, recomputed": (4, ["parallel.tp=2", "parallel.recompute=full", "trainer.micro_batch_size=2"]),
    "selective": (1, ["parallel.recompute=selective"]),
}
STEPS = 12
HALF = STEPS // 2
AT_HALF = f"checkpoint.every={HALF}"


@pytest.fixture(scope="module")
def reference(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that every other is compared with: one process, a checkpoint and an evaluation half-way."""
    run_dir = tmp_path_factory.mktemp("reference")
    worlds.run(1, run_sft, run_dir, *whole(), AT_HALF, f"trainer.eval_every={HALF}")
    return run_dir


def whole() -> list[str]:
    return [f"trainer.max_steps={STEPS}"]


def close(a: float, b: float, relative: float) -> bool:
    return abs(a - b) <= relative * abs(b) + 1e-6


def assert_same_course(run_dir: Path, reference: Path, first: int = 0) -> None:
    """Losses to 1e-5 relative and gradient norms to 1e-4, from step `first` on."""
    ours = metrics(run_dir, "train/loss", "train/grad_norm")
    theirs = metrics(reference, "train/loss", "train/grad_norm")[first:]
    assert len(ours) == len(theirs) == STEPS - first
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ours, theirs, strict=True):
        assert close(loss, wanted_loss, 1e-5)
        assert close(norm, wanted_norm, 1e-4)


@pytest.mark.parametrize(
    "layout", gated([name for name in LAYOUTS if name != "TP2xPP2"], ["TP2", "PP2", "TP2xDP2, recomputed"])
)
def test_layouts_train_alike(layout: str, worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    worlds.run(world, run_sft, tmp_path, *whole(), *overrides, "checkpoint.save_last=false")
    assert_same_course(tmp_path, reference)


def test_initial_weights_are_equal_bit_for_bit(worlds: Worlds, tmp_path: Path) -> None:
    start = ["trainer.max_steps=1", "optim.lr=0"]
    worlds.run(1, run_sft, tmp_path / "one", *start)
    worlds.run(4, run_sft, tmp_path / "four", *start, "parallel.tp=2", "parallel.pp=2")
    one, four = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "four")
    weights = [key for key in one if "optimizer" not in key]
    assert_same_bits({key: one[key] for key in weights}, {key: four[key] for key in weights})


def test_a_run_cut_in_two_ends_in_the_same_weights(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    half = reference / "checkpoints" / f"step-{HALF:07}"
    resumed = tmp_path / "resumed"
    worlds.run(1, run_sft, resumed, *whole(), f"run.resume={half}", f"trainer.eval_every={HALF}")
    assert_same_bits(final_tensors(resumed), final_tensors(reference))
    assert_same_course(resumed, reference, first=HALF)


def test_a_resume_takes_the_optimizers_settings_of_the_run(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    half = reference / "checkpoints" / f"step-{HALF:07}"
    other = ["optim.lr=2e-3", "optim.beta1=0.8", "optim.beta2=0.7", "optim.eps=1e-6"]
    worlds.run(1, run_sft, tmp_path, *whole(), *other, f"run.resume={half}")
    ours, theirs = metrics(tmp_path, "train/lr"), metrics(reference, "train/lr")[HALF:]
    assert [rate for (rate,) in ours] == pytest.approx([2 * rate for (rate,) in theirs])
    log = (tmp_path / "logs" / "rank-0000.log").read_text()
    assert "the optimizer settings of policy differ from the checkpoint's and are used: max_lr 0.001 -> 0.002" in log
    common, _ = plain_content(find(tmp_path / "checkpoints")[-1])
    groups = values_of(common, "param_groups")
    assert groups
    assert all((group["betas"], group["eps"]) == ((0.8, 0.7), 1e-6) for group in groups[0])


def values_of(tree: Any, name: str) -> list[Any]:
    """Everything that a nest of plain values holds under a name."""
    if isinstance(tree, list | tuple):
        return [found for value in tree for found in values_of(value, name)]
    if not isinstance(tree, dict):
        return []
    return [found for key, value in tree.items() for found in ([value] if key == name else values_of(value, name))]


@pytest.mark.parametrize("layout", ["TP2xPP2", "DP2"])
def test_a_checkpoint_resumes_in_another_layout(layout: str, worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    half = reference / "checkpoints" / f"step-{HALF:07}"
    worlds.run(world, run_sft, tmp_path, *whole(), *overrides, f"run.resume={half}")
    assert_same_course(tmp_path, reference, first=HALF)


def test_a_run_on_four_trains_alike_and_resumes_in_one_process(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    four, (world, overrides) = tmp_path / "four", LAYOUTS["TP2xPP2"]
    worlds.run(world, run_sft, four, *whole(), *overrides, AT_HALF)
    assert_same_course(four, reference)
    one = tmp_path / "one"
    worlds.run(1, run_sft, one, *whole(), f"run.resume={four}/checkpoints/step-{HALF:07}")
    assert_same_course(one, reference, first=HALF)


def test_background_saves_hold_the_same_bits(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    worlds.run(2, run_sft, tmp_path, *whole(), AT_HALF, "checkpoint.async_save=true", f"trainer.eval_every={HALF}")
    assert [path.name for path in find(tmp_path / "checkpoints")] == [f"step-{HALF:07}", f"step-{STEPS:07}"]
    worlds.run(1, run_sft, tmp_path / "resumed", *whole(), f"run.resume={tmp_path}/checkpoints/step-{HALF:07}")
    assert_same_course(tmp_path / "resumed", reference, first=HALF)


def test_bf16_trains_and_stays_near_float32(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    worlds.run(2, run_sft, tmp_path, *whole(), "trainer.precision=bf16", "parallel.tp=2", "checkpoint.save_last=false")
    ours, theirs = metrics(tmp_path, "train/loss"), metrics(reference, "train/loss")
    assert ours[-1][0] == pytest.approx(theirs[-1][0], rel=0.02)
    assert ours[-1][0] < ours[0][0]


def test_frozen_layers_keep_their_bits_and_resume_under_pipelining(worlds: Worlds, tmp_path: Path) -> None:
    frozen = [
        *whole(),
        "model.num_layers_unfrozen=1",
        "parallel.pp=2",
        AT_HALF,
        "checkpoint.keep_last=9",
    ]
    worlds.run(2, run_sft, tmp_path, *frozen)
    first, last = (final for final in find(tmp_path / "checkpoints"))
    before, after = tensors(first), tensors(last)
    for layer in range(4):
        qkv = f"policy.decoder.layers.{layer}.self_attention.linear_qkv.weight"
        assert torch.equal(before[qkv], after[qkv]) == (layer < 3)
    assert torch.equal(
        before["policy.embedding.word_embeddings.weight"], after["policy.embedding.word_embeddings.weight"]
    )
    worlds.run(2, run_sft, tmp_path / "resumed", *frozen, f"run.resume={first}")
    assert_same_bits(final_tensors(tmp_path / "resumed"), after)


SAVED_AT_1 = ["checkpoint.every=1", "checkpoint.keep_last=3", "optim.schedule=constant"]


@pytest.mark.parametrize("dp", [1, 2])
def test_optimizer_state_is_saved_under_its_own_names(dp: int, worlds: Worlds, tmp_path: Path) -> None:
    """With tied embeddings the last stage's gradients lie in two buckets, with padding behind the first."""
    tied = ["model.tie_embeddings=true", "model.hidden_size=40", "parallel.pp=2", "trainer.max_steps=2", *SAVED_AT_1]
    worlds.run(2 * dp, run_sft, tmp_path, *tied)
    saved = final_tensors(tmp_path)
    state = {name: value for name, value in saved.items() if ".optimizer.state.param." in name}
    assert len(state) > 20
    assert_same_bits(state, {name: saved[name.replace(".optimizer.state.param.", ".")] for name in state})
    worlds.run(2 * dp, run_sft, tmp_path / "resumed", *tied, f"run.resume={tmp_path / 'checkpoints' / 'step-0000001'}")
    assert_same_bits(final_tensors(tmp_path / "resumed"), saved)


def test_the_run_folder_tells_the_whole_story(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == STEPS
    values = [value for (value,) in metrics(reference, "eval/loss")]
    assert len(values) == 2
    assert summary["metrics"]["eval/loss"]["last"] == pytest.approx(values[-1])
    assert summary["metrics"]["eval/loss"]["last5"] == pytest.approx(sum(values) / 2)
    for name in (
        "config.yaml",
        "versions.json",
        "git.json",
        "logs/rank-0000.log",
        f"checkpoints/step-{STEPS:07}/{MANIFEST}",
    ):
        assert (reference / name).is_file(), name


def start_afresh(*overrides: str) -> "subprocess.Popen[str]":
    """The command in an interpreter that has imported nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", "megarl.train_sft", *SMALL, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_and_resume_by_command_line(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    command = [*whole(), f"run.dir={tmp_path}", AT_HALF, f"trainer.eval_every={HALF}"]
    running = start_afresh(*command)
    deadline = time.monotonic() + 120
    while not find(tmp_path / "checkpoints"):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    resumed = Program("megarl.train_sft", *SMALL, *command)
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert "restoring from" in errors
    assert_same_bits(final_tensors(tmp_path), final_tensors(reference))  # which was not planned: it had a world already
    assert_planned(tmp_path)


def assert_planned(run_dir: Path) -> None:
    """The folder has one plan of the run, and the report sets it against what was measured."""
    assert [path.name for path in run_dir.glob("plan*")] == ["plan.json"]  # a resume plans the same
    plan = json.loads((run_dir / "plan.json").read_text())
    (rank,) = plan["ranks"]
    weights = tensors(find(run_dir / "checkpoints")[-1])
    kept = [weight for name, weight in weights.items() if ".optimizer." not in name]
    assert rank["parameters"] == {"policy": sum(weight.numel() for weight in kept)}
    held = rank["phases"]["train"]["roles"]["policy"]["weights"]
    assert held == pytest.approx(4 * rank["parameters"]["policy"], rel=1e-3)  # buffers are padded
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert plan["tokens"] == config["trainer"]["global_batch_size"] * config["data"]["seq_length"]
    assert (plan["device"], plan["layout"], plan["seconds_for"]) == ("cpu", "TP1", None)
    section = parse((run_dir / "report.html").read_text()).all("section", id="predicted")[0].text()
    assert f"tokens of the sequences of a step{plan['tokens']:,}" in section
    assert "Memory is not compared" in section


def failed(tmp_path: Path, *overrides: str, code: int = 2) -> str:
    """The one line that a run which cannot go on leaves on stderr."""
    running = Program("megarl.train_sft", *SMALL, f"run.dir={tmp_path}", "trainer.max_steps=6", *overrides)
    _, errors = running.communicate()
    assert running.returncode == code, errors
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


def test_nan_ends_the_run_with_its_own_exit_code_and_the_batch(tmp_path: Path) -> None:
    line = failed(tmp_path, "optim.lr=1e30", "optim.clip_grad=0", "checkpoint.every=1", "optim.warmup_steps=0", code=3)
    assert "nan-batch-rank0.pt" in line
    assert (tmp_path / "nan-batch-rank0.pt").is_file()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    for tensor in final_tensors(tmp_path).values():
        assert bool(torch.isfinite(tensor).all())


def test_a_finding_that_health_stop_on_names_ends_the_run_before_the_step_is_saved(tmp_path: Path) -> None:
    """A learning rate of 0 is found after ten logged steps."""
    every = ("checkpoint.every=1", "trainer.log_every=1", "trainer.max_steps=20", "trainer.eval_every=null")
    line = failed(tmp_path, "optim.lr=0", "health.stop_on=[learning_rate_ended]", *every, code=3)
    assert "learning_rate_ended" in line
    assert "step 10" in line
    assert find(tmp_path / "checkpoints")[-1].name == "step-0000009"
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 10
    named = [one["name"] for one in json.loads((tmp_path / "findings.json").read_text())["findings"]]
    assert named[0] == "learning_rate_ended"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "learning_rate_ended" in summary["error"]


def test_a_broken_record_is_named_by_file_and_line(worlds: Worlds, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    with refused(DataError, where=f"{data}:2", names=("JSON",)):
        worlds.run(1, run_sft, tmp_path / "run", f"data.train=[{data}]")


@pytest.mark.parametrize(("other", "old"), [("model.hidden_size=32", 64), ("model.num_layers=2", 4)])
def test_a_checkpoint_of_another_model_is_refused(
    other: str, old: int, worlds: Worlds, reference: Path, tmp_path: Path
) -> None:
    key, _, value = other.partition("=")
    where = str(find(reference / "checkpoints")[-1])
    with refused(CheckpointError, key=key, value=int(value), where=where, offers={key: [old]}):
        worlds.run(1, run_sft, tmp_path, f"run.resume={reference / 'checkpoints'}", other)
