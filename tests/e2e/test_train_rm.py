"""Whole runs of reward models: equal in every layout, exact resume, anchors that need no oracle."""

import json
import math
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from megarl.checkpoint import find
from megarl.command import NOTICED
from megarl.config.compose import compose
from megarl.config.sections.parallel import ParallelConfig
from megarl.data.prompts import Prompt
from megarl.errors import CheckpointError, ConfigError, DataError
from megarl.experience.model_scorer import ModelScorer
from megarl.models.build import build_engine
from megarl.models.exchange.formats import open_source
from megarl.models.roles import Role
from megarl.modules.ppo import PPO
from megarl.modules.rm import RewardModel
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.offload import WEIGHTS
from megarl.parallel.rows import Rows
from megarl.rollout.requests import Rollout
from megarl.tokenizers import ByteTokenizer, build_tokenizer
from megarl.training import train
from tests.e2e.runs import PAIRS, assert_same_bits, final_tensors, launched, metrics, run_entry, run_preference
from tests.gated import gated
from tests.refusals import refused
from tests.worlds import Worlds

LAYOUTS = {
    "TP2xPP2+SP": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, ["trainer.micro_batch_size=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "a prompt to a bin": (1, ["data.pack=false"]),
}
OWN = ["rm.center_coef=0.01", "rm.normalise=true"]


def text(random: Random, vowels: float, length: int) -> str:
    return "".join(random.choice("aeiou" if random.random() < vowels else "bcdfgklm") for _ in range(length))


def utility(response: str) -> float:
    return sum(letter in "aeiou" for letter in response) / len(response)


def write(folder: Path, records: Any) -> Path:
    """Lay down 30 records to train on and 10 to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 30), ("eval", 10)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(records()) + "\n" for _ in range(count)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data of each kind, on texts of many lengths of which the one with more vowels is better."""
    random, folder = Random(7), tmp_path_factory.mktemp("judged")

    def ranking() -> dict[str, Any]:
        prompt = text(random, 0.4, random.randint(1, 9))
        if random.random() < 0.5:
            better, worse = text(random, 0.8, random.randint(1, 24)), text(random, 0.1, random.randint(1, 24))
            return {"prompt": prompt, "chosen": better, "rejected": worse, "margin": 0.5}
        several = [text(random, random.random(), random.randint(3, 24)) for _ in range(random.randint(2, 5))]
        return {"prompt": prompt, "responses": several, "scores": [utility(one) for one in several]}

    def regression() -> dict[str, Any]:
        response = text(random, random.random(), random.randint(1, 24))
        return {"prompt": text(random, 0.4, 4), "completion": response, "score": utility(response)}

    def steps() -> dict[str, Any]:
        several = [text(random, random.choice((0.1, 0.9)), random.randint(2, 9)) for _ in range(random.randint(1, 4))]
        return {"prompt": "p", "steps": several, "labels": [utility(one) > 0.5 for one in several]}

    return {kind.__name__: write(folder / kind.__name__, kind) for kind in (ranking, regression, steps)}


@pytest.fixture(scope="module")
def reference(worlds: Worlds, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs and ranked lists in one process."""
    run_dir = tmp_path_factory.mktemp("rm")
    worlds.run(1, run_preference, run_dir, "rm", folders["ranking"], *OWN)
    return run_dir


def assert_same_course(run_dir: Path, reference: Path, *names: str) -> None:
    for stage, count in (("train", 12), ("eval", 2)):
        logged = [f"{stage}/{name}" for name in ("loss", *names)]
        ours, theirs = metrics(run_dir, *logged), metrics(reference, *logged)
        assert len(ours) == len(theirs) == count
        for mine, wanted in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(wanted, rel=1e-5, abs=2e-6)


def scores_of(run_dir: Path) -> list[float]:
    return [json.loads(line)["score"] for line in (run_dir / "scores.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["PP2"]))
def test_a_reward_model_is_the_same_in_every_layout(
    layout: str, worlds: Worlds, folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    world, overrides = LAYOUTS[layout]
    worlds.run(world, run_preference, tmp_path, "rm", folders["ranking"], *OWN, *overrides)
    assert_same_course(tmp_path, reference, "accuracy", "margin", "score")
    assert scores_of(tmp_path) == pytest.approx(scores_of(reference), rel=1e-5, abs=1e-5)
    assert (tmp_path / "calibration.csv").read_text().splitlines()[0] == "from,to,pairs,confidence,accuracy"
    assert (tmp_path / "calibration.svg").read_text().startswith("<svg")
    moments = [torch.tensor(open_source(run / "checkpoints").score_moments) for run in (tmp_path, reference)]
    torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-5)


MEASURED = {"regression": "error", "steps": "accuracy"}
FOUR = [("regression", "TP2xPP2+SP"), ("steps", "TP2xPP2+SP")]


@pytest.mark.parametrize(("kind", "layout"), gated([("regression", "DP2"), ("steps", "PP2"), *FOUR], FOUR))
def test_scores_and_steps_are_learned_the_same_in_every_layout(
    kind: str, layout: str, worlds: Worlds, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, (world, overrides) in (("one", (1, [])), ("several", LAYOUTS[layout])):
        worlds.run(world, run_preference, tmp_path / name, "rm", folders[kind], f"rm.kind={kind}", *overrides)
    assert_same_course(tmp_path / "several", tmp_path / "one", MEASURED[kind], "score")
    losses = metrics(tmp_path / "one", "train/loss")
    assert losses[-1] < losses[0]


def test_it_learns_to_prefer_and_describes_its_scores(reference: Path) -> None:
    assert metrics(reference, "eval/accuracy")[-1][0] > 0.85
    scores = torch.tensor(scores_of(reference), dtype=torch.float64)
    mean, std = open_source(reference / "checkpoints").score_moments or (0.0, 0.0)
    assert (mean, std) == pytest.approx((float(scores.mean()), float(scores.std())), rel=1e-6)


def run_with_signal(run_dir: Path, data: Path, at: int, *overrides: str) -> tuple[int, list[int]]:
    """Train, and get SIGTERM in the step after `at` others. The result of the run, and the steps of all scoring."""
    scored: list[int] = []
    step, evaluate = RewardModel.training_step, RewardModel._evaluate

    def training_step(self: RewardModel, *args: Any) -> None:
        if self.steps_done == at:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *args)

    def watched(self: RewardModel, units: torch.Tensor) -> None:
        scored.append(self.steps_done)
        evaluate(self, units)

    files = [f"data.train=[{data / 'train.jsonl'}]", f"data.eval=[{data / 'eval.jsonl'}]"]
    config, _ = compose("rm", [*PAIRS, *files, f"run.dir={run_dir}", *overrides])
    with pytest.MonkeyPatch.context() as patch, launched():
        patch.setattr(RewardModel, "training_step", training_step)
        patch.setattr(RewardModel, "_evaluate", watched)
        return train("rm", config), scored


def test_a_run_that_is_stopped_early_saves_without_scoring_and_keeps_the_moments_it_has(
    worlds: Worlds, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = (folders["ranking"], "rm.normalise=true", "trainer.max_steps=6", "trainer.eval_every=2")
    (found,) = worlds.run(1, run_with_signal, tmp_path / "early", given[0], 0, *given[1:])
    assert found == (NOTICED, [])
    assert open_source(tmp_path / "early" / "checkpoints").score_moments is None
    (found,) = worlds.run(1, run_with_signal, tmp_path / "late", given[0], 2, *given[1:])
    assert (found[0], set(found[1])) == (NOTICED, {2})
    source = open_source(tmp_path / "late" / "checkpoints")
    scores = torch.tensor(scores_of(tmp_path / "late"), dtype=torch.float64)
    assert source.score_moments == pytest.approx((float(scores.mean()), float(scores.std())), rel=1e-6)
    assert source.reward_kind == "ranking"
    # Stopped again before its first evaluation, it still has the moments of the one before.
    worlds.run(1, run_with_signal, tmp_path / "late", given[0], 3, *given[1:], "trainer.eval_every=6")
    again = open_source(tmp_path / "late" / "checkpoints")
    assert again.path != source.path
    assert again.score_moments == source.score_moments


def test_a_run_cut_in_two_ends_in_the_same_weights(
    worlds: Worlds, folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    command = (1, run_preference, tmp_path, "rm", folders["ranking"], *OWN)
    worlds.run(*command, "trainer.max_steps=6")
    worlds.run(*command)
    assert_same_bits(final_tensors(tmp_path), final_tensors(reference))
    assert not [name for name in final_tensors(tmp_path) if "output_layer" in name]


def test_a_zero_head_gives_ln_2_and_swapped_pairs_mirror_the_evaluation(
    worlds: Worlds, folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    random = Random(3)
    pairs = [(text(random, 0.7, 9), text(random, 0.3, 9)) for _ in range(16)]
    for name, swap in (("as they are", False), ("swapped", True)):
        lines = [json.dumps({"prompt": "p", "chosen": pair[swap], "rejected": pair[not swap]}) + "\n" for pair in pairs]
        data = tmp_path / "data" / name
        data.mkdir(parents=True)
        for file in ("train", "eval"):
            (data / f"{file}.jsonl").write_text("".join(lines))
        start = [f"model.path={reference / 'checkpoints'}", "optim.lr=0", "trainer.max_steps=1", "trainer.eval_every=1"]
        worlds.run(1, run_preference, tmp_path / name, "rm", data, *start)
    plain, swapped = (
        metrics(tmp_path / name, "eval/accuracy", "eval/margin")[0] for name in ("as they are", "swapped")
    )
    assert swapped[0] == pytest.approx(1 - plain[0])
    assert swapped[1] == pytest.approx(-plain[1], rel=1e-5)
    zero = ["rm.init_std=0", "trainer.max_steps=1", "trainer.eval_every=null"]
    worlds.run(1, run_preference, tmp_path / "zero", "rm", tmp_path / "data" / "swapped", *zero)
    assert metrics(tmp_path / "zero", "train/loss")[0][0] == pytest.approx(math.log(2), rel=1e-6)


def test_a_reward_model_cannot_be_a_policy(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    checkpoint = find(reference / "checkpoints")[-1]
    data = write(tmp_path / "pairs", lambda: {"prompt": "p", "chosen": "a", "rejected": "b"})
    with refused(CheckpointError, key="model.path", value=str(checkpoint), where=str(checkpoint)):
        worlds.run(1, run_preference, tmp_path / "policy", "orpo", data, f"model.path={checkpoint}")
    with refused(CheckpointError, key="dpo.reference_path", value=str(checkpoint)):
        worlds.run(1, run_preference, tmp_path / "reference", "dpo", data, f"dpo.reference_path={checkpoint}")


def test_what_cannot_be_learned_from_is_refused(worlds: Worlds, folders: dict[str, Path], tmp_path: Path) -> None:
    with refused(ConfigError, key="rm.normalise", value=True):
        worlds.run(1, run_preference, tmp_path, "rm", folders["ranking"], "rm.normalise=true", "data.eval=[]")
    with refused(DataError, key="completion"):
        worlds.run(1, run_preference, tmp_path, "rm", folders["ranking"], "rm.kind=regression")


# --- as a scorer --------------------------------------------------------------------------------------------------

PHASES = [
    *("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.max_positions=48"),
    *("rollout.max_new_tokens=12", "ppo.rollouts=8", "ppo.kl_coef=0.05", "trainer.global_batch_size=8"),
    *("trainer.micro_batch_size=4", "trainer.max_phases=2", "trainer.eval_every=null", "optim.schedule=constant"),
    *("trainer.progress=none", "logger.tensorboard=false", "checkpoint.every=1", "optim.lr=1e-3"),
    "optim.warmup_steps=0",
]


def run_with_model(run_dir: Path, prompts: Path, model: Path, *overrides: str) -> None:
    """Train by PPO on prompts, against a reward model."""
    given = [f"data.train=[{prompts}]", f"reward.model={model}", f"run.dir={run_dir}"]
    run_entry("ppo", [*PHASES, *given, *overrides])


def away_while_training(run_dir: Path, prompts: Path, model: Path, *overrides: str) -> list[bool]:
    """Train by PPO; whether the reward model's weights were away when each phase began to train."""
    found: list[bool] = []
    train = PPO._train

    def watch(self: PPO, rows: Rows) -> Any:
        found.append(self.engines["reward"].memory.is_away(WEIGHTS))
        return train(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "_train", watch)
        run_with_model(run_dir, prompts, model, *overrides)
    return found


def scores_in_process(
    folder: Path, tp: int, pp: int, records: list[dict[str, Any]], words: str | None, *, ends_prompts: bool = False
) -> list[float]:
    """Score responses to prompts with a stored reward model, for a policy of bytes or of another tokenizer, with an
    encoder or without."""
    grid = Grid(Layout(tp=tp, pp=pp), start_world())
    source = open_source(folder)
    engine = build_engine(
        Role("reward", source.model, source.vocab_size, ("score",), source=source),
        grid,
        ParallelConfig(),
        precision="fp32",
        seed=1,
    )
    tokenizer = ByteTokenizer() if words is None else build_tokenizer("characters", words)
    tokenizer.ends_prompts = ends_prompts
    scorer = ModelScorer(engine, source, tokenizer, per_microbatch=3)
    prompts = [Prompt(one["prompt"], tuple(tokenizer.encode_prompt(one["prompt"])), {}) for one in records]
    rollouts = []
    for number, one in enumerate(records):
        response = [*tokenizer.encode(one["response"]), tokenizer.eos_id]
        ends = "eos" if number % 2 else "length"
        response = response if ends == "eos" else response[:-1]
        tokens = list(prompts[number].tokens)
        rollouts.append(Rollout(number, 0, tokens, response, [0.0] * len(response), ends))
    found = scorer.score(prompts, rollouts, stream=0, phase=0)
    alike = words is None and ends_prompts == (source.model.encoder is not None)
    assert (found.reencoded > 0) != alike
    grid.close()
    return [float(score) for score in found.values if isinstance(score, float)]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_scores_in_process_are_those_of_its_evaluation(tp: int, pp: int, worlds: Worlds, reference: Path) -> None:
    records = [json.loads(line) for line in (reference / "scores.jsonl").read_text().splitlines()]
    mean, std = open_source(reference / "checkpoints").score_moments or (0.0, 0.0)
    wanted = [(one["score"] - mean) / std for one in records]
    for words in (None, "abcdefghijklmnopqrstuvwxyz"):
        for rank in worlds.run(tp * pp, scores_in_process, reference / "checkpoints", tp, pp, records, words):
            assert rank == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_ppo_against_a_reward_model_is_the_same_in_every_layout_and_resumes_exactly(
    worlds: Worlds, reference: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": letter * 3}) + "\n" for letter in "abcdefgh"))
    command = (run_with_model, tmp_path / "one", prompts, reference)
    worlds.run(1, *command)
    halves = f"{{model:{reference},weight:0.5}},{{model:{reference},weight:0.5,name:again}}"
    twice = ["reward.model=null", f"reward.terms=[{halves},{{fn:tests.e2e.scores:indifferent,weight:0}}]"]
    for name, world, overrides in (
        ("four", 4, [*LAYOUTS["TP2xPP2+SP"][1], "parallel.offload=true", "trainer.max_phases=1"]),
        ("two", 2, ["critic.kind=separate", f"critic.separate.path={reference}", "trainer.max_phases=2", *twice]),
    ):
        worlds.run(world, run_with_model, tmp_path / name, prompts, reference, *overrides)
    names = ("rollout/score", "train/loss")
    assert metrics(tmp_path / "four", *names)[0] == pytest.approx(metrics(tmp_path / "one", *names)[0], rel=1e-5)
    assert metrics(tmp_path / "two", names[0])[0] == pytest.approx(metrics(tmp_path / "one", names[0])[0], rel=1e-5)
    parts = metrics(tmp_path / "two", *(f"rollout/score/{name}" for name in ("reward_model", "again", "indifferent")))
    for (score,), found in zip(metrics(tmp_path / "two", "rollout/score"), parts, strict=True):
        assert found == pytest.approx((score, score, 1.0), rel=1e-5)
    worlds.run(1, run_with_model, tmp_path / "cut", prompts, reference, "trainer.max_phases=1")
    worlds.run(1, run_with_model, tmp_path / "cut", prompts, reference)
    ours, theirs = final_tensors(tmp_path / "cut"), final_tensors(tmp_path / "one")
    assert_same_bits(ours, theirs)
    assert not [name for name in ours if name.startswith("reward")]


def test_with_offload_a_reward_model_is_away_while_the_policy_trains(
    worlds: Worlds, reference: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts", lambda: {"prompt": "abc"}) / "train.jsonl"
    evaluated = ["trainer.max_phases=3", f"data.eval=[{prompts}]", "trainer.eval_every=1"]
    for name, offload in (("plain", False), ("offload", True)):
        setting = f"parallel.offload={str(offload).lower()}"
        command = (away_while_training, tmp_path / name, prompts, reference, *evaluated, setting)
        assert worlds.run(1, *command) == [[offload] * 3]
    names = ("eval/score", "rollout/score", "train/loss")
    for name in names:
        assert metrics(tmp_path / "offload", name) == metrics(tmp_path / "plain", name)
    assert len(metrics(tmp_path / "plain", "eval/score")) >= 3


def test_a_policy_is_no_reward_model(worlds: Worlds, reference: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts", lambda: {"prompt": "a"}) / "train.jsonl"
    longer = ["trainer.max_phases=1", "model.max_positions=512"]  # than the reward model's context, which is no error
    worlds.run(1, run_with_model, tmp_path / "run", prompts, reference, *longer)
    with refused(ConfigError, key="reward.model", value=str(tmp_path / "run")):
        worlds.run(1, run_with_model, tmp_path / "again", prompts, tmp_path / "run")
    with refused(
        ConfigError, key="reward.model", value=str(reference), offers={"reward.fn": [None], "reward.model": [None]}
    ):
        worlds.run(1, run_with_model, tmp_path / "both", prompts, reference, "reward.fn=a.py:b")
