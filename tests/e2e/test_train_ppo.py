"""Whole PPO runs: the same numbers in every layout, exact resume after a kill in a phase, replay, bad rewards."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.checkpoint import find, plain_content, tensors, verify
from megarl.errors import CheckpointError, ConfigError, DataError, MegarlError, NumericsError, RewardError
from megarl.rollout.stored import load
from tests.e2e.runs import WALKS, assert_same_bits, final_tensors, metrics, run_ppo
from tests.gated import gated
from tests.programs import Program
from tests.refusals import assert_refusal
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2+SP": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, ["trainer.micro_batch_size=3"]),
}
CRITICS = {
    "shared": ["ppo.adaptive_kl.target=1", "ppo.adaptive_kl.horizon=100", "ppo.scale_scores=running"],
    "separate": ["critic.kind=separate", "critic.separate.lr=1e-3", "ppo.kl_in=loss", "ppo.entropy_coef=0.01"],
}
TO_1E5 = ("rollout/score", "rollout/kl", "rollout/kl_coef", "rollout/entropy", "policy/loss", "value/loss")
TO_1E4 = ("train/grad_norm",)
PHASES = 3
LENGTH = "reward.fn=megarl.rewards.builtin:length"
THREES = ["trainer.global_batch_size=3", "trainer.micro_batch_size=3"]
SAVED = ["checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.save_last=true"]


def run_alone(critic: str, worlds: Worlds, factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a kind of critic, and, at the end, the folder of its run in one process: three phases, all saved."""
    settings, run_dir = CRITICS[critic], factory.mktemp(critic)
    more = [f"trainer.max_phases={PHASES}", *SAVED, f"rollout.dump={run_dir / 'dump'}"]
    worlds.run(1, run_ppo, run_dir, *settings, *more)
    return [*settings, str(run_dir)]


@pytest.fixture(scope="module")
def shared(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return run_alone("shared", worlds, tmp_path_factory)


@pytest.fixture(scope="module")
def separate(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return run_alone("separate", worlds, tmp_path_factory)


@pytest.fixture(params=CRITICS)
def reference(request: pytest.FixtureRequest) -> list[str]:
    """The run that others are compared with, of each kind."""
    found: list[str] = request.getfixturevalue(request.param)
    return found


def assert_close(ours: Path, theirs: Path, names: tuple[str, ...], relative: float, phases: slice) -> None:
    """The phases that `ours` logged against those of `theirs`, as long as both have the metric."""
    mine, wanted = metrics(ours, *names), metrics(theirs, *names)[phases]
    assert len(mine) == len(wanted) > 0, f"{ours} logged {len(mine)} phases of {names}"
    for phase, (row, expected) in enumerate(zip(mine, wanted, strict=True), 1):
        for name, value, number in zip(names, row, expected, strict=True):
            assert value == pytest.approx(number, rel=relative, abs=2e-6), f"{name} in phase {phase}"


def traces(run: Path) -> list[dict[str, Any]]:
    """The traced responses of the first phase."""
    found = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    return [trace for trace in found if trace["phase"] == 1]


def assert_same_course(ours: Path, theirs: Path, settings: list[str], phases: slice) -> None:
    critics = ("train/critic_grad_norm",) if "critic.kind=separate" in settings else ()
    assert_close(ours, theirs, TO_1E5, 1e-5, phases)
    assert_close(ours, theirs, TO_1E4 + critics, 1e-4, phases)


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2", "PP2"]))
def test_layouts_run_the_same_phases(layout: str, worlds: Worlds, reference: list[str], tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    *settings, single = reference
    worlds.run(world, run_ppo, tmp_path, *settings, *overrides, f"rollout.dump={tmp_path / 'dump'}")
    ours, theirs = (load(Path(folder, "dump", "train-000000.jsonl")) for folder in (tmp_path, single))
    assert [rollout.tokens for rollout in ours] == [rollout.tokens for rollout in theirs]
    assert_same_course(tmp_path, Path(single), settings, slice(2))
    for trace, wanted in zip(traces(tmp_path), traces(Path(single)), strict=True):
        assert trace.keys() == wanted.keys() >= {"old_logprobs", "new_logprobs", "ref_logprobs", "advantages", "values"}
        assert trace["tokens"] == wanted["tokens"]
        for name in ("old_logprobs", "new_logprobs", "advantages", "values"):
            assert trace[name] == pytest.approx(wanted[name], rel=1e-4, abs=2e-5), name
        assert trace["new_logprobs"] != trace["old_logprobs"]


def test_a_run_cut_in_two_ends_in_the_same_weights(worlds: Worlds, reference: list[str], tmp_path: Path) -> None:
    """Weights and optimizers of both models, the KL's weight, the scores' moments and the prompts' order go on."""
    *settings, single = reference
    cut = f"run.resume={Path(single) / 'checkpoints' / 'step-0000001'}"
    worlds.run(1, run_ppo, tmp_path, *settings, *SAVED, f"trainer.max_phases={PHASES}", cut)
    assert_same_bits(final_tensors(tmp_path), final_tensors(Path(single)))
    for name in TO_1E5:
        assert metrics(tmp_path, name) == metrics(Path(single), name)[1:], name
    assert [path.name for path in find(tmp_path / "checkpoints")] == ["step-0000002", "step-0000003"]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == PHASES


def test_a_phase_is_run_again_elsewhere_from_its_rollouts_and_scores(
    worlds: Worlds, reference: list[str], tmp_path: Path
) -> None:
    """The second phase, on two stages. Nothing is drawn, and the function is not asked: what it says would be in the
    run's own journal."""
    *settings, single = reference
    world, overrides = LAYOUTS["PP2"]
    stored = [f"run.resume={single}/checkpoints/step-0000001", f"rollout.replay={single}/dump"]
    worlds.run(world, run_ppo, tmp_path, *settings, *overrides, *stored, "trainer.max_phases=2")
    assert_same_course(tmp_path, Path(single), settings, slice(1, 2))
    assert not (tmp_path / "journal").exists()


def test_a_value_head_learns_from_the_first_phase_on(reference: list[str]) -> None:
    """It would stay as it started if the optimizer did not know it."""
    *settings, single = reference
    name = "critic" if "critic.kind=separate" in settings else "policy"
    saved = [tensors(path) for path in find(Path(single) / "checkpoints")]
    outer = [found[f"{name}.value_head.outer.weight"] for found in saved]
    inner = [found[f"{name}.value_head.inner.weight"] for found in saved]
    assert all(bool(weight.any()) for weight in outer)
    assert not torch.equal(inner[0], inner[1])


def test_the_first_phase_is_the_references_own_and_later_ones_are_not(reference: list[str]) -> None:
    (first,), *later = metrics(Path(reference[-1]), "rollout/kl")
    assert first == 0.0
    assert all(kl != 0.0 for (kl,) in later)


@pytest.mark.parametrize(("unfrozen", "world", "layout"), [(1, 1, []), (1, 2, ["parallel.pp=2"]), (0, 1, [])])
def test_a_partly_frozen_policy_starts_at_its_reference_too(
    unfrozen: int, world: int, layout: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    learns = [LENGTH, f"model.num_layers_unfrozen={unfrozen}"]
    worlds.run(world, run_ppo, tmp_path, *learns, *layout)
    (first,), (second,) = metrics(tmp_path, "rollout/kl")
    assert first == 0.0
    assert second != 0.0


@pytest.mark.parametrize(("critic", "steps"), [("shared", 1), ("separate", 4)])
def test_a_policy_that_has_moved_too_far_trains_no_more_in_its_phase(
    critic: str, steps: int, worlds: Worlds, tmp_path: Path
) -> None:
    """Its first step moves it; the second minibatch sees that. A separate critic takes all four steps."""
    limit = ["ppo.stop_at_kl=1e-9", f"critic.kind={critic}", "trainer.max_phases=1", "optim.lr=1e-2"]
    worlds.run(1, run_ppo, tmp_path, *limit, "clone.steps=20")
    ((taken, moved, largest),) = metrics(tmp_path, "train/optimizer_steps", "policy/approx_kl", "policy/approx_kl_max")
    assert taken == steps
    assert largest > 1e-9
    assert moved == pytest.approx(largest / 2, abs=1e-7)  # of two minibatches, the first of which starts from no change


def test_a_learning_rate_follows_the_phases_that_are_done(worlds: Worlds, tmp_path: Path) -> None:
    """Whatever optimizer steps they had: the first two are cut short, and the others have smaller minibatches."""
    schedule = ["optim.schedule=linear", "optim.warmup_steps=0", "optim.lr=1e-2", "optim.min_lr_ratio=0.1"]
    settings = [*schedule, *SAVED, "clone.data=[]", "critic.kind=separate"]
    worlds.run(1, run_ppo, tmp_path, *settings, "ppo.stop_at_kl=1e-9", "trainer.max_phases=2")
    assert metrics(tmp_path, "train/lr") == [(pytest.approx(1e-2),), (pytest.approx(1e-2 * (1 - 0.9 / 2)),)]
    smaller = [*THREES, "ppo.stop_at_kl=null", "trainer.max_phases=4"]
    worlds.run(1, run_ppo, tmp_path, *settings, *smaller)
    assert metrics(tmp_path, "train/lr")[2:] == [(pytest.approx(1e-2 * (1 - 0.9 * done / 4)),) for done in (2, 3)]


def test_sharing_slots_changes_no_number(worlds: Worlds, separate: list[str], tmp_path: Path) -> None:
    *settings, single = separate
    worlds.run(1, run_ppo, tmp_path, *settings, "ppo.pack=false")
    assert_same_course(tmp_path, Path(single), settings, slice(2))


def test_an_untied_critic_of_its_own_trains_all_it_has(worlds: Worlds, tmp_path: Path) -> None:
    """It has no use for an output layer, so none trains, and no invariant misses its gradient."""
    worlds.run(1, run_ppo, tmp_path, *QUICK, *SAVED, "critic.kind=separate", "model.tie_embeddings=false")
    names = final_tensors(tmp_path).keys()
    assert any("optimizer" in name and "policy" in name and "output_layer" in name for name in names)
    assert not any("optimizer" in name and "critic" in name and "output_layer" in name for name in names)


# --- a critic from elsewhere ------------------------------------------------------------------------------------------

QUICK = ["clone.data=[]", "ppo.inner_epochs=2", "trainer.max_phases=1"]


def test_a_critic_starts_from_the_trunk_it_is_given(worlds: Worlds, shared: list[str], tmp_path: Path) -> None:
    given = find(Path(shared[-1]) / "checkpoints")[-1]
    still = ["critic.kind=separate", f"critic.separate.path={given}", "optim.lr=0", *SAVED]
    worlds.run(1, run_ppo, tmp_path, *QUICK, *still)
    ours, theirs = final_tensors(tmp_path), tensors(given)
    trunk = [name for name in theirs if name.startswith("policy.decoder.") and "optimizer" not in name]
    assert len(trunk) > 10
    for name in trunk:
        assert torch.equal(ours[name.replace("policy.", "critic.", 1)], theirs[name]), name


def test_a_critic_of_another_tokenizer_is_refused(worlds: Worlds, shared: list[str], tmp_path: Path) -> None:
    given = find(Path(shared[-1]) / "checkpoints")[-1]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    policy = ["tokenizer.kind=bytes", "tokenizer.path=null", f"data.train=[{prompts}]", "data.eval=[]"]
    error = ended(worlds, tmp_path, "critic.kind=separate", f"critic.separate.path={given}", *policy)
    assert isinstance(error, ConfigError)
    assert_refusal(error, names=(f"critic.separate.path={given}", "vocab_size=23"))


def test_a_critic_that_begins_alone_has_a_longer_schedule(worlds: Worlds, tmp_path: Path) -> None:
    """Two minibatches and two inner epochs a phase: the critic's rate falls over all three phases, the policy's over
    two."""
    alone = ["critic.kind=separate", "critic.separate.warmup_phases=1", "trainer.max_phases=3", "optim.schedule=linear"]
    worlds.run(1, run_ppo, tmp_path, "clone.data=[]", "checkpoint.save_last=true", *alone)
    (saved,) = find(tmp_path / "checkpoints")
    engines = plain_content(saved)[0]["sharded_common"]
    steps = {name: engines[name]["schedule"]["lr_decay_steps"] for name in ("policy", "critic")}
    assert steps == {"policy": 8, "critic": 12}


@pytest.mark.parametrize("key", ["model.path", "critic.separate.path"])
def test_a_damaged_checkpoint_is_refused(key: str, worlds: Worlds, shared: list[str], tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(find(Path(shared[-1]) / "checkpoints")[-1], given)
    (shard,) = given.glob("rank-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    start = ["critic.kind=separate", f"{key}={given}", "clone.data=[]"]
    error = ended(worlds, tmp_path, *start)
    assert isinstance(error, CheckpointError)
    assert_refusal(error, names=(f"{key}={given}", shard.name))
    (given / "common.pt").write_bytes(b"no zip archive"[: (given / "common.pt").stat().st_size])
    error = ended(worlds, tmp_path, *start)
    assert isinstance(error, CheckpointError)


# --- a kill in a phase ------------------------------------------------------------------------------------------------


def test_a_run_killed_while_it_scores_asks_for_no_score_twice(worlds: Worlds, tmp_path: Path) -> None:
    """Killed in its second phase, when two of four calls are answered. The weights are the unbroken run's."""

    def settings(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        asked = ["reward.fn=tests.e2e.scores:written_down", f"+reward.options.folder={tmp_path / name}"]
        saved = ["checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.save_last=true", "trainer.max_phases=3"]
        return [*asked, "reward.calls.batch_size=4", *saved, *CRITICS["shared"]]

    worlds.run(1, run_ppo, tmp_path / "unbroken" / "run", *settings("unbroken"))
    folder = tmp_path / "broken"
    command = [*settings("broken"), f"run.dir={folder / 'run'}"]
    (folder / "hold").touch()
    running = Program("megarl.train_ppo", *WALKS, *command)
    deadline = time.monotonic() + 200
    while not (folder / "held").exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    (folder / "hold").unlink()
    worlds.run(1, run_ppo, folder / "run", *settings("broken"))
    assert "restoring from" in (folder / "run" / "logs" / "rank-0000.log").read_text()
    assert_same_bits(final_tensors(folder / "run"), final_tensors(tmp_path / "unbroken" / "run"))
    scored = [(place / "scored.txt").read_text().splitlines() for place in (folder, tmp_path / "unbroken")]
    assert scored[0] == scored[1]
    assert len(scored[0]) == 3 * 16
    # The last save saw the second phase's checkpoint: what lies before it was let go.
    assert [path.name for path in (folder / "run" / "journal").iterdir()] == ["reward-train-000002.jsonl"]


# --- functions that misbehave -----------------------------------------------------------------------------------------


def run_to_its_end(run_dir: Path, *overrides: str) -> MegarlError | None:
    """The error that a run ends with; None where it finishes."""
    try:
        run_ppo(run_dir, *QUICK, *overrides)
    except MegarlError as problem:
        return problem
    return None


def ended(worlds: Worlds, run_dir: Path, *overrides: str, world: int = 1) -> Any:
    """The first rank's error. All ranks end with the same kind."""
    first, *others = worlds.run(world, run_to_its_end, run_dir, *overrides)
    assert all(type(other) is type(first) for other in others)
    return first


ONE_TRY = ["reward.calls.retries=0", "reward.calls.timeout=1"]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("tests.rewards.functions:raises", ("cannot judge this",)),
        ("tests.rewards.functions:too_few", ("15 scores", "16 samples")),
        ("tests.rewards.functions:sleeps", ("1 s",)),
        ("tests.e2e.scores:not_a_number", ("sample 0", "nan", "15")),
    ],
)
def test_a_function_that_gives_no_scores_ends_the_run_in_a_line(
    function: str, names: tuple[str, ...], worlds: Worlds, tmp_path: Path
) -> None:
    error = ended(worlds, tmp_path, f"reward.fn={function}", *ONE_TRY, world=2)
    assert isinstance(error, RewardError)
    assert_refusal(error, names=(f"reward.fn={function} ", "reward.calls.on_error=drop", *names))


def test_a_call_that_never_returns_costs_its_samples_alone(worlds: Worlds, tmp_path: Path) -> None:
    slow = ["reward.fn=tests.e2e.scores:sleeps_once", f"+reward.options.folder={tmp_path}", "reward.calls.batch_size=4"]
    assert ended(worlds, tmp_path / "run", *slow, *ONE_TRY, "reward.calls.on_error=drop") is None
    assert metrics(tmp_path / "run", "rollout/dropped") == [(4.0,)]


def test_a_phase_without_any_score_ends_the_run(worlds: Worlds, tmp_path: Path) -> None:
    nothing = ["reward.fn=tests.e2e.scores:not_a_number", "reward.calls.on_error=drop"]
    error = ended(worlds, tmp_path, *nothing)
    assert isinstance(error, RewardError)
    offers = {"reward.calls.on_error": ["error"]}
    assert_refusal(
        error, key="reward.fn", value="tests.e2e.scores:not_a_number", offers=offers, names=("16", "phase 1")
    )


def test_samples_without_a_score_leave_the_same_phase_in_every_layout(worlds: Worlds, tmp_path: Path) -> None:
    """Fewer rows than planned, and a number that two replicas cannot halve, change nothing but the counts."""
    picky = ["reward.fn=tests.e2e.scores:picky", "reward.calls.on_error=drop", "reward.calls.retries=0"]
    for world in (1, 2):
        assert ended(worlds, tmp_path / str(world), *picky, world=world) is None
    ((dropped,),) = metrics(tmp_path / "1", "rollout/dropped")
    assert 0 < dropped < 16
    assert dropped % 2 == 1
    assert_close(tmp_path / "2", tmp_path / "1", ("rollout/dropped", *TO_1E5), 1e-5, slice(None))


def test_equal_scores_teach_nothing_and_break_nothing(worlds: Worlds, tmp_path: Path) -> None:
    equal = ["reward.fn=tests.e2e.scores:indifferent", "ppo.scale_scores=running", "ppo.whiten_rewards=true"]
    assert ended(worlds, tmp_path, *equal, "trainer.max_phases=2") is None
    assert (tmp_path / "logs" / "rank-0000.log").read_text().count("no signal to learn from") == 1
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_a_phase_of_cut_responses_trains_on_none_of_them(aggregation: str, worlds: Worlds, tmp_path: Path) -> None:
    """Of two tokens, hardly any response has an end: minibatches without a token to train on are no error."""
    cut = ["ppo.mask_overlong=true", "rollout.max_new_tokens=2", f"ppo.aggregation={aggregation}"]
    assert ended(worlds, tmp_path, *cut, *THREES) is None
    ((share, loss),) = metrics(tmp_path, "rollout/cut", "policy/loss")
    assert share > 0.7
    assert math.isfinite(loss)


def test_an_empty_file_of_prompts_ends_the_run_by_its_name(worlds: Worlds, tmp_path: Path) -> None:
    empty = tmp_path / "prompts.jsonl"
    empty.write_text("")
    error = ended(worlds, tmp_path, f"data.train=[{empty}]")
    assert isinstance(error, DataError)
    assert_refusal(error, names=(f"{empty}: ",))


def test_a_policy_that_runs_away_is_stopped_with_its_last_checkpoint_whole(worlds: Worlds, tmp_path: Path) -> None:
    far = ["ppo.kl_limit=0.1", "ppo.kl_kind=abs", "optim.lr=1e-2", "trainer.max_phases=5", *SAVED, LENGTH]
    error = ended(worlds, tmp_path, *far)
    assert isinstance(error, NumericsError)
    assert error.exit_code == 3
    assert_refusal(error, key="ppo.kl_limit", value=0.1, names=("ppo.kl_coef", "optim.lr"))
    saved = find(tmp_path / "checkpoints")
    assert [path.name for path in saved] == ["step-0000001"]
    assert verify(saved[0]) is None
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
