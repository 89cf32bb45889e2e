"""Whole runs without a critic: groups that microbatches and ranks cut, exact resume, greedy baselines, what is held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.checkpoint import find, tensors
from megarl.rollout.stored import load
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_ppo
from tests.gated import gated
from tests.worlds import Worlds

# Groups of four responses, in microbatches of three and minibatches of twelve.
KL = ["ppo.kl_in=loss", "ppo.kl_kind=k3", "ppo.clip_scores=null"]
GRPO = ["ppo.advantages=grpo", "critic.kind=none", "rollout.n=4", "reward.fn=megarl.rewards.builtin:length", *KL]
SAVED = ["checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.save_last=true"]
NAMES = ("rollout/score", "rollout/kl", "rollout/entropy", "policy/loss", "policy/kl_loss", "train/loss")
LAYOUTS = {
    "TP2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pp=2"]),
    "DP2": (2, []),
}


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three phases in one process, all saved."""
    run_dir = tmp_path_factory.mktemp("grpo")
    worlds.run(1, run_ppo, run_dir, *GRPO, *SAVED, "trainer.max_phases=3", f"rollout.dump={run_dir / 'dump'}")
    return run_dir


def assert_same_course(ours: Path, theirs: Path, phases: slice) -> None:
    for names, relative in ((NAMES, 1e-5), (("train/grad_norm",), 1e-4)):
        mine, wanted = metrics(ours, *names), metrics(theirs, *names)[phases]
        assert len(mine) == len(wanted) > 0
        for row, expected in zip(mine, wanted, strict=True):
            assert row == pytest.approx(expected, rel=relative, abs=2e-6)


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2"]))
def test_layouts_run_the_same_phases_of_groups(layout: str, worlds: Worlds, alone: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    worlds.run(world, run_ppo, tmp_path, *GRPO, *overrides, f"rollout.dump={tmp_path / 'dump'}")
    ours, theirs = (load(folder / "dump" / "train-000000.jsonl") for folder in (tmp_path, alone))
    assert [rollout.tokens for rollout in ours] == [rollout.tokens for rollout in theirs]
    assert_same_course(tmp_path, alone, slice(2))


def test_groups_have_something_to_compare(alone: Path) -> None:
    """Or the other tests would compare nothing."""
    for silent, single, norm in metrics(
        alone, "rollout/zero_spread_groups", "rollout/groups_of_one", "train/grad_norm"
    ):
        assert silent < 4
        assert single == 0
        assert norm > 0


def test_a_run_without_a_critic_that_is_cut_in_two_ends_in_the_same_weights(
    worlds: Worlds, alone: Path, tmp_path: Path
) -> None:
    cut = f"run.resume={alone / 'checkpoints' / 'step-0000001'}"
    worlds.run(1, run_ppo, tmp_path, *GRPO, *SAVED, "trainer.max_phases=3", cut)
    assert_same_bits(final_tensors(tmp_path), final_tensors(alone))


def test_no_critic_is_held_or_logged(alone: Path) -> None:
    names = tensors(find(alone / "checkpoints")[-1]).keys()
    assert names
    assert not any("value_head" in name or name.startswith("critic.") for name in names)
    summary = json.loads((alone / "summary.json").read_text())
    assert not any(name.startswith("value/") for name in summary["metrics"])


def test_a_greedy_response_to_each_prompt_is_scored_with_the_others_and_does_not_train(
    worlds: Worlds, tmp_path: Path
) -> None:
    """Also where the run goes on from a dump, in another layout. One call asks about sixteen samples and eight greedy
    ones."""
    calls = tmp_path / "calls"
    calls.mkdir()
    asked = ["reward.fn=tests.e2e.scores:counted", f"reward.options.folder={calls}"]
    remax = ["ppo.advantages=remax", "critic.kind=none", "rollout.n=2", *asked]
    worlds.run(1, run_ppo, tmp_path / "one", *remax, f"rollout.dump={tmp_path / 'dump'}")
    assert (calls / "calls.txt").read_text().split() == ["24", "24"]
    greedy = load(tmp_path / "dump" / "greedy-000000.jsonl")
    assert [(rollout.prompt_id, rollout.sample_id) for rollout in greedy] == [(prompt, 0) for prompt in range(8)]
    worlds.run(2, run_ppo, tmp_path / "two", *remax, f"rollout.replay={tmp_path / 'dump'}")
    names = ("rollout/score", "rollout/greedy_score", "rollout/response_tokens", "policy/loss")
    one, two = (metrics(tmp_path / name, *names) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for mine, wanted in zip(one, two, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5, abs=2e-6)
    seconds = json.loads((tmp_path / "one" / "summary.json").read_text())["seconds"]
    assert seconds["generate_greedy"]["wall_s"] > 0
