"""What a resumed run takes from its checkpoint and what from its own settings, in whole small runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint import find, plain_content
from megarl.errors import CheckpointError, MegarlError
from megarl.experience import start_weights
from megarl.modules import clone
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_ppo, run_rft
from tests.refusals import assert_refusal
from tests.worlds import Worlds

TINY = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "clone.steps=6",
    "ppo.rollouts=12",
    "ppo.inner_epochs=1",
    "reward.fn=megarl.rewards.builtin:length",
    "trainer.max_phases=2",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
    "checkpoint.save_last=true",
]
CLONING, AGAIN = "cloning the behaviour of", "repeating the behaviour cloning"


def log_of(run_dir: Path) -> str:
    return (run_dir / "logs" / "rank-0000.log").read_text()


def first_checkpoint(run_dir: Path) -> Path:
    return find(run_dir / "checkpoints")[0]


def kept(run_dir: Path) -> list[str]:
    """Names of what lies in the folder of references, unfinished things included."""
    folder = run_dir / "reference"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture(scope="module")
def unbroken(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases with a reference, after cloning."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    worlds.run(1, run_ppo, run_dir, *TINY)
    return run_dir


# --- cloning ----------------------------------------------------------------------------------------------------------


def test_a_resume_with_a_reference_clones_nothing(worlds: Worlds, unbroken: Path, tmp_path: Path) -> None:
    """From another run's checkpoint, of which it leaves a copy of the reference for its own resumes."""
    worlds.run(1, run_ppo, tmp_path, *TINY, f"run.resume={first_checkpoint(unbroken)}")
    assert CLONING in log_of(unbroken)
    assert CLONING not in log_of(tmp_path)
    assert_same_bits(final_tensors(tmp_path), final_tensors(unbroken))
    (name,) = kept(unbroken)
    assert kept(tmp_path) == [name]
    assert plain_content(first_checkpoint(unbroken))[0]["reference"] == name


@pytest.mark.parametrize("run", [run_ppo, run_rft])
def test_a_resume_without_a_reference_clones_nothing(run: Any, worlds: Worlds, tmp_path: Path) -> None:
    tiny = [setting for setting in TINY if run is run_ppo or not setting.startswith("ppo.")]
    tiny += ["ppo.kl_coef=0"] if run is run_ppo else []
    worlds.run(1, run, tmp_path, *tiny, "trainer.max_phases=1")
    worlds.run(1, run, tmp_path, *tiny)
    assert log_of(tmp_path).count(CLONING) == 1
    assert kept(tmp_path) == []


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_reference_that_cannot_be_found_is_cloned_again_and_that_is_said(
    damage: str, worlds: Worlds, unbroken: Path, tmp_path: Path
) -> None:
    """By the settings of the run's start, whatever this run's say."""
    shutil.copytree(first_checkpoint(unbroken), tmp_path / "checkpoints" / first_checkpoint(unbroken).name)
    (name,) = kept(unbroken)
    if damage == "torn":
        shutil.copytree(unbroken / "reference" / name, tmp_path / "reference" / name)
        (shard,) = (tmp_path / "reference" / name).glob("rank-*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-1])
    worlds.run(1, run_ppo, tmp_path, *TINY, "clone.steps=3")
    log = log_of(tmp_path)
    assert (log.count(CLONING), log.count(AGAIN)) == (1, 1)
    assert "clone.steps: 6 -> 3 (taken from the checkpoint" in log
    assert_same_bits(final_tensors(tmp_path), final_tensors(unbroken))
    assert kept(tmp_path) == [name]


class Killed(Exception):
    """Ends a run as a kill would: nothing is written after it."""


def killed(run_dir: Path, where: str, *overrides: str) -> None:
    """A run that dies in the midst of cloning, with the reference half written, or before it has its name."""
    owner, name = {
        "cloning": (clone, "cross_entropy"),
        "writing": (torch, "save"),
        "naming": (start_weights, "_named"),
    }[where]
    calls = 0
    original = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if where != "cloning" or calls > 3:
            raise Killed
        return original(*args, **kwargs)

    setattr(owner, name, dies)
    try:
        run_ppo(run_dir, *overrides)
    except (Killed, MegarlError):
        return
    finally:
        setattr(owner, name, original)
    raise AssertionError("the run went on")


@pytest.mark.parametrize("where", ["cloning", "writing", "naming"])
def test_a_run_killed_before_its_first_phase_starts_as_if_nothing_had_been(
    where: str, worlds: Worlds, unbroken: Path, tmp_path: Path
) -> None:
    worlds.run(1, killed, tmp_path, where, *TINY)
    assert find(tmp_path / "checkpoints") == []
    worlds.run(1, run_ppo, tmp_path, *TINY)
    assert_same_bits(final_tensors(tmp_path), final_tensors(unbroken))
    assert kept(tmp_path) == kept(unbroken)


def test_another_start_in_the_same_folder_leaves_the_reference_of_the_first(
    worlds: Worlds, unbroken: Path, tmp_path: Path
) -> None:
    """The checkpoints that were set aside can be gone on from."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    worlds.run(1, run_ppo, tmp_path, *TINY, "clone.steps=3", "trainer.max_phases=1", "run.resume=never")
    assert len(kept(tmp_path)) == 2
    aside = tmp_path / "checkpoints" / "earlier-1" / first_checkpoint(unbroken).name
    worlds.run(1, run_ppo, tmp_path / "again", *TINY, f"run.resume={aside}")
    assert CLONING not in log_of(tmp_path / "again")
    assert_same_bits(final_tensors(tmp_path / "again"), final_tensors(unbroken))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_fixed_kl_coefficient_is_this_runs_and_that_is_said(worlds: Worlds, unbroken: Path, tmp_path: Path) -> None:
    start = f"run.resume={first_checkpoint(unbroken)}"
    worlds.run(1, run_ppo, tmp_path, *TINY, "ppo.kl_coef=0.5", "optim.clip_grad=0.3", start)
    ((coefficient,),) = metrics(tmp_path, "rollout/kl_coef")
    assert coefficient == 0.5
    assert log_of(tmp_path).count("the settings of this run differ") == 1
    for said in ("ppo.kl_coef: 0.1 -> 0.5 (takes effect now", "optim.clip_grad: 1.0 -> 0.3 (takes effect now"):
        assert said in log_of(tmp_path)


@pytest.mark.parametrize(("edited", "responses"), [("len(o)", 24), ("-len(o)", 12)])
def test_moments_of_scores_are_counted_anew_where_other_code_scores(
    edited: str, responses: int, worlds: Worlds, tmp_path: Path
) -> None:
    """The function keeps its name, and its file changes or does not."""
    code = "def score(outputs, **_):\n    return [float({}) for o in outputs]\n"
    function = tmp_path / "rewards.py"
    run = [*TINY, "clone.data=[]", "ppo.scale_scores=running", "checkpoint.best.metric=rollout/score"]
    run[run.index("reward.fn=megarl.rewards.builtin:length")] = f"reward.fn={function}:score"
    function.write_text(code.format("len(o)"))
    worlds.run(1, run_ppo, tmp_path / "run", *run, "trainer.max_phases=1")
    function.write_text(code.format(edited))
    worlds.run(1, run_ppo, tmp_path / "run", *run)
    assert plain_content(find(tmp_path / "run" / "checkpoints")[-1])[0]["shaping"]["moments"]["count"] == responses


def test_a_reference_of_random_weights_stays_that_of_the_first_seed(worlds: Worlds, tmp_path: Path) -> None:
    """Nothing is learnt, so policy and reference are what the run started from."""
    still = [*TINY, "clone.data=[]", "optim.lr=0"]
    worlds.run(1, run_ppo, tmp_path, *still, "trainer.max_phases=1")
    worlds.run(1, run_ppo, tmp_path, *still, "seed=8", "model.init_std=0.1")
    assert metrics(tmp_path, "rollout/kl") == [(0.0,), (0.0,)]


def ended(run: Any, run_dir: Path, *overrides: str) -> tuple[MegarlError | None, int]:
    """The error that a run ends with, and how many processes there are."""
    try:
        run(run_dir, *overrides)
    except MegarlError as problem:
        return problem, dist.get_world_size()
    return None, dist.get_world_size()


def test_another_model_or_algorithm_is_refused_by_its_keys(worlds: Worlds, unbroken: Path, tmp_path: Path) -> None:
    start = f"run.resume={first_checkpoint(unbroken)}"
    other = ["model.hidden_size=32", "model.norm=rmsnorm"]
    offers = {"model.hidden_size": [16], "model.norm": ["layernorm"]}
    first, second = worlds.run(2, ended, run_ppo, tmp_path / "model", *TINY, *other, start)
    for error, world in (first, second):
        assert isinstance(error, CheckpointError)
        assert_refusal(error, key="model.hidden_size", value=32, offers=offers, names=("rmsnorm", str(unbroken)))
        assert world == 2
    assert str(first[0]) == str(second[0])
    tiny = [setting for setting in TINY if not setting.startswith("ppo.")]
    error, _ = worlds.run(1, ended, run_rft, tmp_path / "algorithm", *tiny, start)[0]
    assert isinstance(error, CheckpointError)
    assert_refusal(error, key="train_ppo", offers={"run.resume": ["never"]}, names=("train_rft",))


def test_a_refused_resume_leaves_the_record_of_the_run_as_it_was(
    worlds: Worlds, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)

    def record() -> dict[str, bytes]:
        files = (path for path in run_dir.glob("[!.]*") if path.is_file() and path.suffix != ".log")
        return {path.name: path.read_bytes() for path in files}

    before = record()
    ((error, _),) = worlds.run(1, ended, run_ppo, run_dir, *TINY, "model.hidden_size=32")
    assert isinstance(error, CheckpointError)
    assert record() == before


@pytest.mark.parametrize("precision", ["bf16"])
def test_a_resume_in_another_precision_goes_on(precision: str, worlds: Worlds, unbroken: Path, tmp_path: Path) -> None:
    start = f"run.resume={first_checkpoint(unbroken)}"
    worlds.run(1, run_ppo, tmp_path, *TINY, f"trainer.precision={precision}", start)
    assert "trainer.precision: fp32 -> bf16 (takes effect now" in log_of(tmp_path)
