"""Whole runs with adapters: exact resume after a kill, small checkpoints, exports, runs that start from an adapter."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.checkpoint import find
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.formats import merged, open_adapter, open_source
from megarl.models.exchange.source import Source
from megarl.modules.sft import SFT
from tests.e2e.runs import SMALL, assert_same_bits, final_tensors, metrics, run_ilql, run_ppo, run_preference, run_sft
from tests.gated import gated
from tests.models.exchange.published import save_published, stored
from tests.refusals import refused
from tests.worlds import Worlds

STEPS = 6
ADAPTER = ["adapter.rank=2", "adapter.alpha=8", "adapter.kind=dora", "adapter.dropout=0.1"]
COURSE = [
    f"trainer.max_steps={STEPS}",
    "data.eval=[]",
    "checkpoint.every=3",
    "checkpoint.keep_last=9",
    "optim.lr=1e-2",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
]
KINDS = {"lora": ["adapter.rank=2"], "dora": ADAPTER, "qlora": ["adapter.rank=2", "adapter.base_bits=4"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_published("llama", folder, vocab_size=300, num_key_value_heads=2, attention_bias=False, mlp_bias=False)
    return folder


@pytest.fixture(scope="module")
def runs(worlds: Worlds, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, with the run and its exports as hf and peft."""
    root = tmp_path_factory.mktemp("runs")
    for kind, settings in KINDS.items():
        exports = [f"export.hf={root / kind / 'hf'}", f"export.peft={root / kind / 'peft'}"]
        worlds.run(1, run_sft, root / kind / "run", *COURSE, f"model.path={base}", *settings, *exports)
    return {kind: root / kind for kind in KINDS}


def half(run: Path) -> Path:
    return run / "run" / "checkpoints" / "step-0000003"


def assert_same_course(run_dir: Path, wanted: Path, first: int = 0) -> None:
    ours, theirs = (metrics(run, "train/loss", "train/grad_norm") for run in (run_dir, wanted))
    assert len(ours) == STEPS - first
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ours, theirs[first:], strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_contains_the_adapter_alone(kind: str, runs: dict[str, Path]) -> None:
    """Its values, and those of the optimizer: master weights and two moments."""
    folder = half(runs[kind])
    tensors = final_tensors(runs[kind] / "run")
    assert [name for name in tensors if ".adapter." not in name] == []
    adapter = sum(value.nbytes for value in load_file(runs[kind] / "peft" / "adapter_model.safetensors").values())
    assert sum(value.nbytes for name, value in tensors.items() if "optimizer" not in name) == adapter
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 4 * adapter + 40_000
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4 * adapter + 80_000


def test_a_dora_run_cut_in_two_ends_in_the_same_weights(
    worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    worlds.run(1, run_sft, tmp_path, *COURSE, f"model.path={base}", *ADAPTER, f"run.resume={half(runs['dora'])}")
    assert_same_bits(final_tensors(tmp_path), final_tensors(runs["dora"] / "run"))


def killed_after_the_first_checkpoint(run_dir: Path, *overrides: str) -> None:
    """Train, in a process that is killed in a step after the first checkpoint is whole, at the latest in the last."""
    step = SFT.training_step

    def training_step(self: SFT, *given: Any) -> None:
        while self.steps_done == STEPS - 1 and not find(run_dir / "checkpoints"):
            time.sleep(0.001)
        if find(run_dir / "checkpoints"):
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *given)

    SFT.training_step = training_step  # type: ignore[method-assign]
    run_sft(run_dir, *overrides)


@pytest.mark.parametrize("kind", gated(["lora", "qlora"], ["lora"]))
def test_a_killed_run_resumes_exactly(
    kind: str, worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    settings = [f"model.path={base}", *KINDS[kind]]
    with pytest.raises(EOFError):
        worlds.run(1, killed_after_the_first_checkpoint, tmp_path, *COURSE, *settings)
    assert len(find(tmp_path / "checkpoints")) == 1
    worlds.run(1, run_sft, tmp_path, *COURSE, *settings)
    assert_same_bits(final_tensors(tmp_path), final_tensors(runs[kind] / "run"))


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [
        ("lora", 4, ["parallel.tp=2", "parallel.pp=2"]),
        ("qlora", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    ],
)
def test_a_checkpoint_resumes_in_another_layout_and_back(
    kind: str, size: int, layout: list[str], worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    settings = [*COURSE, f"model.path={base}", *KINDS[kind]]
    exports = [f"export.peft={tmp_path / 'peft'}", f"export.hf={tmp_path / 'hf'}"]
    worlds.run(size, run_sft, tmp_path / "there", *settings, *layout, *exports, f"run.resume={half(runs[kind])}")
    assert_same_course(tmp_path / "there", runs[kind] / "run", first=3)
    last = find(tmp_path / "there" / "checkpoints")[-1]
    worlds.run(1, run_sft, tmp_path / "back", *settings, f"trainer.max_steps={STEPS + 1}", f"run.resume={last}")
    last = find(runs[kind] / "run" / "checkpoints")[-1]
    worlds.run(1, run_sft, tmp_path / "on", *settings, f"trainer.max_steps={STEPS + 1}", f"run.resume={last}")
    ((loss,),), ((wanted,),) = (metrics(tmp_path / name, "train/loss") for name in ("back", "on"))
    assert loss == pytest.approx(wanted, rel=1e-5)
    if kind != "qlora":
        assert_same_model(open_source(tmp_path / "hf"), open_source(tmp_path / "there"))
    assert_same_model(open_source(tmp_path / "peft"), open_source(tmp_path / "there"))


def test_another_base_is_refused(worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    other = another(base, tmp_path / "other")
    with refused(CheckpointError, key="model.path", value=str(other), where="step-0000003"):
        worlds.run(
            1, run_sft, tmp_path / "run", *COURSE, f"model.path={other}", *ADAPTER, f"run.resume={half(runs['dora'])}"
        )
    start = f"adapter.path={runs['dora'] / 'run'}"
    for precision in ("fp32", "bf16"):
        with refused(CheckpointError, key="model.path", value=str(other), where="step-0000006"):
            settings = [f"model.path={other}", start, f"trainer.precision={precision}"]
            worlds.run(1, run_sft, tmp_path / precision, *COURSE, *settings)


def test_another_precision_beside_the_same_base_is_fine(
    worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    settings = [f"model.path={base}", *KINDS["lora"], "trainer.precision=bf16"]
    worlds.run(1, run_sft, tmp_path, *COURSE, *settings, f"run.resume={half(runs['lora'])}")
    assert len(metrics(tmp_path, "train/loss")) == STEPS - 3


def test_a_stored_factor_without_a_place_is_refused(
    worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    start = [f"model.path={base}", f"adapter.path={runs['dora'] / 'peft'}", "model.num_layers_unfrozen=1"]
    with refused(CheckpointError, key="adapter.path", names=("model.num_layers_unfrozen", "decoder.layers.0")):
        worlds.run(1, run_sft, tmp_path, *COURSE, *start)


def another(base: Path, folder: Path) -> Path:
    """A copy of a model in which one number differs."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "setting",
    ["adapter.rank=4", "adapter.kind=lora", "adapter.alpha=16", "adapter.base_bits=8", "adapter.targets=[q_proj]"],
)
def test_another_adapter_is_refused_by_its_key(
    setting: str, worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    with refused(CheckpointError, key=setting.partition("=")[0]):
        worlds.run(
            1, run_sft, tmp_path, *COURSE, f"model.path={base}", *ADAPTER, setting, f"run.resume={half(runs['dora'])}"
        )


# --- exports ----------------------------------------------------------------------------------------------------------


def assert_same_model(found: Source, wanted: Source) -> None:
    assert found.names == wanted.names
    for name in wanted.names:
        torch.testing.assert_close(found.read(name), wanted.read(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_exports_are_the_same_model(kind: str, base: Path, runs: dict[str, Path]) -> None:
    folder = runs[kind]
    if kind != "qlora":  # its weights are those that it was trained beside, of 4 bits
        assert_same_model(open_source(folder / "hf"), open_source(folder / "run"))
    assert_same_model(open_source(folder / "peft"), open_source(folder / "run"))
    assert_same_model(merged(open_source(base), open_adapter(folder / "peft")), open_source(folder / "run"))
    changed = [name for name, tensor in stored(folder / "hf").items() if not torch.equal(tensor, stored(base)[name])]
    assert len(changed) == 2 * 7


def test_an_export_without_an_adapter_is_refused(tmp_path: Path) -> None:
    from megarl.config.compose import compose
    from megarl.config.rules import check

    config, _ = compose("sft", [*SMALL, f"export.peft={tmp_path / 'peft'}"])
    with refused(ConfigError, key="export.peft", offers={"export.peft": [None]}):
        check(config, 1)


def test_an_adapter_is_not_exported_from_another_base(base: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint knows the weights that it was trained beside."""
    other = another(base, tmp_path / "other")
    source = merged(open_source(other), open_adapter(runs["lora"] / "run"))
    with refused(CheckpointError, key="decoder.layers.0.mlp.linear_fc1.weight", where="other"):
        source.read("decoder.layers.0.mlp.linear_fc1.weight")


# --- starting from adapters -------------------------------------------------------------------------------------------

STILL = ["trainer.max_steps=1", "optim.lr=0", "data.eval=[]", "checkpoint.save_last=false"]


@pytest.mark.parametrize("origin", ["run", "peft"])
def test_a_run_starts_from_the_merged_model(origin: str, worlds: Worlds, runs: dict[str, Path], tmp_path: Path) -> None:
    path = f"model.path={runs['dora'] / origin}"
    worlds.run(1, run_sft, tmp_path / "run", *STILL, path, f"export.hf={tmp_path / 'hf'}")
    assert_same_model(open_source(tmp_path / "hf"), open_source(runs["dora"] / "hf"))


@pytest.mark.parametrize("origin", ["run", "peft"])
def test_a_run_starts_from_the_factors(
    origin: str, worlds: Worlds, base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    path = [f"model.path={base}", f"adapter.path={runs['dora'] / origin}"]
    worlds.run(1, run_sft, tmp_path / "run", *STILL, *path, f"export.peft={tmp_path / 'peft'}")
    found, wanted = (load_file(it / "peft" / "adapter_model.safetensors") for it in (tmp_path, runs["dora"]))
    assert_same_bits(found, wanted)


def generated(path: Path) -> list[dict[str, object]]:
    from megarl.config.compose import compose
    from megarl.generate import work

    argv = [f"model.path={path}", "prompts='Once upon'", "rollout.max_new_tokens=8", "rollout.temperature=0"]
    with contextlib.redirect_stdout(io.StringIO()) as written:
        work(compose("generate", [*argv, "trainer.progress=none"])[0])
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_generating_from_a_run_and_its_exports_gives_the_same_text(worlds: Worlds, runs: dict[str, Path]) -> None:
    found = [worlds.run(1, generated, runs["dora"] / name)[0] for name in ("hf", "run", "peft")]
    assert len(found[0]) == 1
    for lines in found[1:]:
        assert [{**line, "logprob": 0} for line in lines] == [{**line, "logprob": 0} for line in found[0]]


# --- other algorithms -------------------------------------------------------------------------------------------------

PPO = [
    *("model.hidden_size=16", "clone.data=[]", "ppo.rollouts=12", "ppo.inner_epochs=2"),
    *("reward.fn=megarl.rewards.builtin:length", "critic.kind=separate", "critic.separate.lr=1e-2", "optim.lr=1e-2"),
    *("trainer.max_phases=2", "checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.save_last=true"),
    "adapter.rank=2",
]


def test_ppo_starts_at_its_reference_and_resumes_exactly(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, run_ppo, tmp_path / "whole", *PPO, "checkpoint.async_save=false")
    (first,), (second,) = metrics(tmp_path / "whole", "rollout/kl")
    assert first == 0.0
    assert second != 0.0
    tensors = final_tensors(tmp_path / "whole")
    weights = {name for name in tensors if "optimizer" not in name}
    assert {name.split(".")[0] for name in weights} == {"policy", "critic"}
    assert all(".adapter." in name or "value_head" in name for name in weights)
    start = find(tmp_path / "whole" / "checkpoints")[0]
    worlds.run(1, run_ppo, tmp_path / "cut", *PPO, f"run.resume={start}")
    assert_same_bits(final_tensors(tmp_path / "cut"), tensors)
    assert metrics(tmp_path / "cut", "rollout/kl") == [(second,)]


def test_ppo_clones_into_the_adapter_alone(worlds: Worlds, tmp_path: Path) -> None:
    """The reference has the cloned adapter, so that KL is 0 before the first update."""
    settings = [*PPO, "clone.data=null", "clone.steps=6", "clone.lr=1e-2"]
    settings = [setting for setting in settings if not setting.startswith("clone.data")]
    worlds.run(1, run_ppo, tmp_path / "whole", *settings)
    assert metrics(tmp_path / "whole", "rollout/kl")[0] == (0.0,)
    start = find(tmp_path / "whole" / "checkpoints")[0]
    worlds.run(1, run_ppo, tmp_path / "cut", *settings, f"run.resume={start}")
    assert_same_bits(final_tensors(tmp_path / "cut"), final_tensors(tmp_path / "whole"))


def test_the_reference_of_a_resumed_run_has_the_adapter_that_the_run_started_with(
    worlds: Worlds, tmp_path: Path
) -> None:
    """Also where the resume does not name it, or names another."""
    worlds.run(1, run_ppo, tmp_path / "origin", *PPO, "trainer.max_phases=1", "ppo.kl_coef=0")
    start = f"adapter.path={tmp_path / 'origin'}"
    worlds.run(1, run_ppo, tmp_path / "whole", *PPO, start)
    (first,), (second,) = metrics(tmp_path / "whole", "rollout/kl")
    assert first == 0.0
    resumed = find(tmp_path / "whole" / "checkpoints")[0]
    for name, settings in (("named", [start]), ("not", [])):
        worlds.run(1, run_ppo, tmp_path / name, *PPO, *settings, f"run.resume={resumed}")
        assert metrics(tmp_path / name, "rollout/kl") == [(second,)]
        assert_same_bits(final_tensors(tmp_path / name), final_tensors(tmp_path / "whole"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pairs"), Random(5)
    for name, count in (("train", 24), ("eval", 8)):
        records = [
            {key: "".join(random.choices(letters, k=random.randint(2, 16))) for key, letters in PARTS.items()}
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


PARTS = {"prompt": "abcde", "chosen": "aeiou", "rejected": "xyzwv"}


def test_dpo_has_the_base_as_reference_resident_or_cached(
    worlds: Worlds, base: Path, runs: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    names = ("train/loss", "train/margin", "train/grad_norm")
    found = {}
    for start, settings in (("new", ["adapter.rank=2"]), ("trained", [f"adapter.path={runs['dora'] / 'peft'}"])):
        for kind in ("resident", "cached"):
            run_dir = tmp_path / start / kind
            more = [f"model.path={base}", f"dpo.reference={kind}", f"dpo.cache={tmp_path / 'cache'}", *settings]
            worlds.run(1, run_preference, run_dir, "dpo", pairs, *more, "trainer.max_steps=4", "optim.lr=1e-2")
            found[start, kind] = metrics(run_dir, *names)
        assert len(found[start, "resident"]) == 4
        assert found[start, "resident"][0][0] == pytest.approx(math.log(2), abs=1e-6)
        assert found[start, "resident"][-1][1] != 0.0
        for ours, theirs in zip(found[start, "resident"], found[start, "cached"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert found["new", "cached"][1] != found["trained", "cached"][1]


def test_ilql_starts_from_its_adapter_and_heads_in_another_layout(worlds: Worlds, tmp_path: Path) -> None:
    """Q heads have a row for every token, and padding in some layouts."""
    settings = ["adapter.rank=2", "trainer.max_steps=2", "model.vocab_size=23", "checkpoint.save_last=true"]
    worlds.run(1, run_ilql, tmp_path / "first", *settings)
    start = [f"adapter.path={tmp_path / 'first'}", "optim.lr=0"]
    for name, size, layout in (("one", 1, []), ("two", 2, ["parallel.tp=2"])):
        worlds.run(size, run_ilql, tmp_path / name, *settings, *start, *layout)
    one, two = (metrics(tmp_path / name, "train/loss") for name in ("one", "two"))
    assert [loss for (loss,) in two] == pytest.approx([loss for (loss,) in one], rel=1e-5)
    assert one[0] != metrics(tmp_path / "first", "train/loss")[0]


def test_a_reward_model_trains_its_adapter_and_head(worlds: Worlds, base: Path, pairs: Path, tmp_path: Path) -> None:
    exports = [f"export.hf={tmp_path / 'hf'}", f"export.peft={tmp_path / 'peft'}"]
    settings = [f"model.path={base}", "adapter.rank=2", "trainer.max_steps=2", *exports]
    worlds.run(2, run_preference, tmp_path / "run", "rm", pairs, *settings, "parallel.tp=2")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert [name for name in found if "lora_" not in name] == ["base_model.model.score.weight"]
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    for folder in ("run", "peft"):
        assert_same_model(open_source(tmp_path / folder), open_source(tmp_path / "hf"))
    assert open_source(tmp_path / "run").score_moments == open_source(tmp_path / "hf").score_moments
