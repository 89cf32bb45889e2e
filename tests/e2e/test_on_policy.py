"""Whole runs of what on-policy algorithms add to PPO: replaced prompts, masked actions, objectives and corrections."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.checkpoint import find, tensors
from megarl.errors import InvariantError, NothingToLearnError, RewardError
from megarl.experience import action_mask
from megarl.rollout.noise import TRAINING
from megarl.rollout.stored import dump, load, phase_file
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_ppo
from tests.e2e.test_train_ppo import QUICK, ended
from tests.gated import gated
from tests.refusals import assert_refusal
from tests.worlds import Worlds

LENGTH_REWARD = ["reward.fn=megarl.rewards.builtin:length", "ppo.clip_scores=null"]
RUNS = {
    "replacing": [
        *("ppo.advantages=grpo", "critic.kind=none", "rollout.n=4", "ppo.dynamic_sampling={}"),
        *("reward.fn=tests.e2e.scores:seldom", "ppo.clip_scores=null", "ppo.clip_high=0.28"),
        *("ppo.overlong.penalty=0.5", "ppo.overlong.buffer=0.5", "ppo.adaptive_entropy.target=9", "ppo.correction={}"),
        *("ppo.entropy_coef=0.01", "ppo.kl_in=loss", "ppo.kl_kind=k3_unbiased"),
        *(
            "data.train=[megarl.tasks.randomwalks:prompts,megarl.tasks.randomwalks:prompts]",
            "data.mixing.weights=[1,3]",
        ),
        *("data.mixing.final_weights=[3,1]", "data.mixing.over_phases=2"),
    ],
    "masking": [
        *("ppo.action_mask.top_p=0.8", "ppo.action_mask.refresh_every=2", "ppo.objective=cispo", "optim.lr=1e-3"),
        *LENGTH_REWARD,
        "rollout.engine.slots=6",
    ],
}
NAMES = ("rollout/score", "rollout/entropy", "rollout/response_tokens", "policy/loss", "train/loss")
OWN = {
    "replacing": ("rollout/prompts", "rollout/replaced", "rollout/score_before_replacing", "rollout/entropy_coef"),
    "masking": ("rollout/allowed_tokens", "value/loss"),
}
SAVED = ["checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.save_last=true", "trainer.max_phases=3"]
LAYOUTS = {
    "TP2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, ["trainer.micro_batch_size=3"]),
}
# Masks have shards of the vocabulary to care for, and replaced prompts have replicas.
CASES = [("replacing", "DP2"), ("masking", "TP2")]
LATER = [("replacing", "TP2xPP2"), ("masking", "TP2xPP2"), ("masking", "DP2")]
Alone = dict[str, Path]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The folders of runs of three phases in one process, all saved."""
    found = {}
    for name, settings in RUNS.items():
        found[name] = tmp_path_factory.mktemp(name)
        worlds.run(1, run_ppo, found[name], *settings, *SAVED, f"rollout.dump={found[name] / 'dump'}")
    return found


def run_in_chunks(run_dir: Path, *overrides: str) -> None:
    """Run with masks that are computed for a few positions at a time, on vocabulary shards of unequal size."""
    whole = action_mask.CHUNK_ELEMENTS_CPU
    action_mask.CHUNK_ELEMENTS_CPU = 33  # two positions of 12 tokens, and three of 11
    try:
        run_ppo(run_dir, *overrides)
    finally:
        action_mask.CHUNK_ELEMENTS_CPU = whole


def responses(folder: Path) -> dict[str, list[list[int]]]:
    """The tokens of all dumped training responses, by file."""
    paths = sorted((folder / "dump").glob("train-*.jsonl"))
    return {path.name: [rollout.tokens for rollout in load(path)] for path in paths}


@pytest.mark.parametrize(("name", "layout"), gated([*CASES, *LATER], LATER))
def test_layouts_run_the_same_phases(name: str, layout: str, worlds: Worlds, alone: Alone, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    more = ["trainer.max_phases=3", f"rollout.dump={tmp_path / 'dump'}"]
    worlds.run(world, run_in_chunks, tmp_path, *RUNS[name], *overrides, *more)
    assert responses(tmp_path) == responses(alone[name])
    for names, relative in (((*NAMES, *OWN[name]), 1e-5), (("train/grad_norm",), 1e-4)):
        ours, wanted = (metrics(folder, *names) for folder in (tmp_path, alone[name]))
        assert len(ours) == len(wanted) == 3
        for row, expected in zip(ours, wanted, strict=True):
            assert row == pytest.approx(expected, rel=relative, abs=2e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_cut_in_two_ends_in_the_same_weights(name: str, worlds: Worlds, alone: Alone, tmp_path: Path) -> None:
    """The cursor of the prompts, the copy that masks and the weight of the entropy go on."""
    cut = f"run.resume={alone[name] / 'checkpoints' / 'step-0000001'}"
    worlds.run(1, run_ppo, tmp_path, *RUNS[name], *SAVED, cut)
    assert_same_bits(final_tensors(tmp_path), final_tensors(alone[name]))


def test_a_run_killed_while_prompts_are_replaced_scores_no_response_twice(worlds: Worlds, tmp_path: Path) -> None:
    def settings(folder: Path, late: int) -> list[str]:
        function = ["reward.fn=tests.e2e.scores:kills_the_run", f"reward.options.folder={folder}"]
        calls = [f"reward.options.late={late}", "reward.calls.batch_size=4"]
        return [*RUNS["replacing"], *SAVED, *function, *calls]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    worlds.run(1, run_ppo, whole, *settings(whole, 1))
    prompts = [int(count) for (count,) in metrics(whole, "rollout/prompts")]
    phase = next(number for number, count in enumerate(prompts) if count > 4)
    before = 4 * sum(prompts[:phase])
    late = settings(cut, before + 16)  # the first call for the prompts that replace others
    cut.mkdir()
    (cut / "kill").touch()
    with pytest.raises(EOFError):  # the process is gone
        worlds.run(1, run_ppo, cut, *late)
    scored = (cut / "scored.txt").read_text().splitlines()
    assert len(scored) == before + 16
    assert len(find(cut / "checkpoints")) == phase
    worlds.run(1, run_ppo, cut, *late)
    assert_same_bits(final_tensors(cut), final_tensors(whole))
    assert (cut / "scored.txt").read_text() == (whole / "scored.txt").read_text()


def test_prompts_without_spread_are_replaced_until_the_phase_is_full(alone: Alone) -> None:
    found = metrics(alone["replacing"], "rollout/prompts", "rollout/replaced", "rollout/zero_spread_groups")
    assert all(prompts - replaced == 4 and spread == 0 for prompts, replaced, spread in found)
    assert sum(replaced for _, replaced, _ in found) > 0
    files = responses(alone["replacing"])
    assert any("-from-" in name for name in files)
    assert sum(map(len, files.values())) == 4 * sum(prompts for prompts, _, _ in found)


def test_a_dump_with_replaced_prompts_is_replayed(worlds: Worlds, alone: Alone, tmp_path: Path) -> None:
    stored = f"rollout.replay={alone['replacing'] / 'dump'}"
    worlds.run(1, run_ppo, tmp_path, *RUNS["replacing"], stored, "trainer.max_phases=3")
    assert metrics(tmp_path, *NAMES) == metrics(alone["replacing"], *NAMES)


CORRECTION = ("correction/mean", "correction/ess", "correction/chi2", "correction/kl", "correction/limited")


def test_weights_are_one_for_our_own_responses_in_float32(alone: Alone) -> None:
    for found in metrics(alone["replacing"], *CORRECTION):
        assert found == pytest.approx((1, 1, 0, 0, 0), abs=1e-5)


def test_weights_correct_for_responses_that_another_policy_sampled(
    worlds: Worlds, alone: Alone, tmp_path: Path
) -> None:
    """Another program found every token less likely by a factor of e^-0.1."""
    for path in (alone["replacing"] / "dump").glob("train-000000*"):
        foreign = [replace(one, logprobs=[value - 0.1 for value in one.logprobs]) for one in load(path)]
        dump(tmp_path / "dump" / path.name, foreign)
    settings = [*RUNS["replacing"], f"rollout.replay={tmp_path / 'dump'}", "trainer.max_phases=1"]
    wanted = (math.exp(0.1), 1, math.exp(0.2) - 1, math.exp(0.1) - 1.1, 0)
    worlds.run(1, run_ppo, tmp_path / "all", *settings)
    assert metrics(tmp_path / "all", *CORRECTION) == [pytest.approx(wanted, rel=1e-4, abs=1e-5)]
    nothing_else = ["ppo.adaptive_entropy.target=null", "ppo.entropy_coef=0", "ppo.kl_coef=0"]
    masked = ["ppo.correction.high=1.05", "ppo.correction.method=mask", *nothing_else]
    worlds.run(1, run_ppo, tmp_path / "few", *settings, *masked)  # no tensor has a gradient, as is to be expected
    ((*_, limited), (loss,)) = (metrics(tmp_path / "few", *names)[0] for names in (CORRECTION, ["policy/loss"]))
    assert (limited, loss) == (1, 0)


def test_weights_correct_for_older_weights_and_for_another_precision(worlds: Worlds, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    settings = [f"data.train=[{tmp_path}/prompts.jsonl]", *LENGTH_REWARD, "rollout.n=16", "ppo.correction={}"]
    fresh, old, coarse = (tmp_path / name for name in ("fresh", "old", "coarse"))
    worlds.run(1, run_ppo, fresh, *settings, f"rollout.dump={fresh / 'dump'}", "optim.lr=3e-3")
    first = phase_file(fresh / "dump", TRAINING, 0)
    phase_file(fresh / "dump", TRAINING, 1).write_bytes(first.read_bytes())
    worlds.run(1, run_ppo, old, *settings, f"rollout.replay={fresh / 'dump'}", "optim.lr=3e-3")
    sampled_in_float32 = f"rollout.replay={fresh / 'dump'}"
    worlds.run(1, run_ppo, coarse, *settings, sampled_in_float32, "trainer.precision=bf16", "trainer.max_phases=1")
    of_fresh, of_old, of_coarse = (metrics(folder, *CORRECTION) for folder in (fresh, old, coarse))
    for found in (*of_fresh, of_old[0]):
        assert found == pytest.approx((1, 1, 0, 0, 0), abs=1e-5)
    _, ess, chi2, kl, _ = of_old[1]
    assert 0.1 < ess < 0.999
    assert chi2 > 1e-3
    assert kl > 1e-3
    ((_, ess, _, kl, _),) = of_coarse
    assert 0.9 < ess < 1
    assert 1e-8 < kl < 1e-2


def test_a_phase_without_any_spread_ends_in_one_line(worlds: Worlds, tmp_path: Path) -> None:
    equal = [*RUNS["replacing"], "reward.fn=tests.e2e.scores:indifferent", "ppo.dynamic_sampling.limit=3"]
    error = ended(worlds, tmp_path, *equal)
    assert isinstance(error, RewardError)
    assert_refusal(error, key="ppo.dynamic_sampling.limit", value=3.0, names=("12 prompts", "phase 1"))


def test_weights_are_saved_before_a_later_phase_without_spread_ends_the_run(worlds: Worlds, tmp_path: Path) -> None:
    """They are those of a run that was to have as many phases, and a resume goes on from them."""
    always = [*RUNS["replacing"], *QUICK, "checkpoint.save_last=true"]
    at_first = [*always, "reward.fn=tests.e2e.scores:seldom_at_first"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder in (cut, whole):
        folder.mkdir()
    error = ended(worlds, cut, *at_first, f"reward.options.folder={cut}", "trainer.max_phases=9")
    assert isinstance(error, NothingToLearnError)
    (saved,) = find(cut / "checkpoints")
    phases = len(metrics(cut, "policy/loss"))
    assert 1 <= phases < 6
    worlds.run(1, run_ppo, whole, *at_first, f"reward.options.folder={whole}", f"trainer.max_phases={phases}")
    assert_same_bits(tensors(saved), final_tensors(whole))
    for folder in (cut, whole):
        worlds.run(1, run_ppo, folder, *always, f"trainer.max_phases={phases + 1}")
    assert_same_bits(final_tensors(cut), final_tensors(whole))
    assert len(metrics(cut, "policy/loss")) == phases + 1


def test_the_copy_that_masks_is_saved_and_refreshed_when_it_is_due(alone: Alone) -> None:
    saved = [tensors(path) for path in find(alone["masking"] / "checkpoints")]
    name = "action_mask.embedding.word_embeddings.weight"
    copies = [found[name] for found in saved]
    policies = [found[name.replace("action_mask", "policy")] for found in saved]
    assert bool((copies[0] != policies[0]).any())  # after one phase it is the start
    assert bool((copies[1] == policies[1]).all())
    assert bool((copies[2] == copies[1]).all())


def run_without_refresh(run_dir: Path, *overrides: str) -> InvariantError:
    """The error of a run whose copy that masks is never given the policy's weights."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(action_mask.ActionMask, "refresh", lambda mask, policy: None)
        with pytest.raises(InvariantError) as found:
            run_ppo(run_dir, *overrides)
    return found.value


def test_a_copy_that_masks_is_the_policy_once_it_was_refreshed(worlds: Worlds, tmp_path: Path) -> None:
    """Behaviour was cloned into the policy, so the copy has other weights."""
    (error,) = worlds.run(1, run_without_refresh, tmp_path, *RUNS["masking"])
    offers = {"health.invariants": ["warn"]}
    assert_refusal(error, key="weights_arrived", offers=offers, names=("before phase 1", "action_mask", "policy"))
    assert not (tmp_path / "metrics.csv").exists()


def test_a_mask_of_everything_changes_nothing(worlds: Worlds, tmp_path: Path) -> None:
    """With top_p=1 there is no mask; just below, every token is in the lists that masks are made of."""
    worlds.run(1, run_ppo, tmp_path / "plain", *LENGTH_REWARD)
    wanted = metrics(tmp_path / "plain", *NAMES, "train/grad_norm")
    assert len(wanted) == 2
    for top_p in ("1", "0.9999999999"):
        worlds.run(1, run_ppo, tmp_path / top_p, *LENGTH_REWARD, f"ppo.action_mask.top_p={top_p}")
        for row, expected in zip(metrics(tmp_path / top_p, *NAMES, "train/grad_norm"), wanted, strict=True):
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-7)
        tokens = metrics(tmp_path / top_p, "rollout/allowed_tokens")
        assert len(set(tokens)) == 1
        assert tokens[0][0] > 20
