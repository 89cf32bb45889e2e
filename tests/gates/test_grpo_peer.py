"""GRPO and its kin beside TRL's GRPOTrainer: of the same responses, four updates have the same losses and gradient
norms."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.grpo import LETTER, LETTERS, Sizes, prompts, write_model
from megarl.config.sections.data import PromptDataConfig
from megarl.data.mixture import prompt_order
from megarl.data.prompts import Prompt
from megarl.rollout.noise import TRAINING
from megarl.rollout.requests import Rollout
from megarl.rollout.stored import dump, phase_file
from tests.e2e.runs import updates, updates_written_to
from tests.gates import trl_settings
from tests.gates.environments import ROOT, run
from tests.gates.test_preference_peer import train
from tests.worlds import Worlds

SCRIPT = ROOT / "benchmarks" / "peers" / "trl_grpo.py"
SIZES = Sizes(layers=2, width=32, heads=4, longest=40, prompts=6, group=4, phases=1)
UPDATES, SEED = 4, 1
LOSS_TOLERANCE = 1e-4
WORTH = 1000.0
"""Of a letter, where scores are divided by a deviation: TRL adds 1e-4 to it, and we add 1e-6."""


@dataclass(frozen=True)
class Case:
    """An algorithm with its settings on both sides."""

    theirs: dict[str, Any]
    ours: list[str]


CASES = {
    "grpo": Case({"loss_type": "grpo"}, ["ppo.aggregation=seq_mean_token_mean"]),
    "token mean": Case({"loss_type": "dapo", "epsilon_high": 0.28}, ["ppo.clip_high=0.28"]),
    "dr_grpo": Case(
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        ["ppo.advantages=dr_grpo", "ppo.aggregation=seq_mean_token_sum_norm"],
    ),
    "gspo": Case(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        ["+conf=gspo", "rollout.n=4", "ppo.clip_low=0.02", "ppo.clip_high=0.03"],
    ),
    # Their bound is of the ratio, ours of its distance from 1.
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.02}, ["+conf=cispo", "rollout.n=4", "ppo.clip_high=0.02"]),
    "kl": Case(
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
        ["ppo.kl_coef=0.1", "ppo.kl_in=loss", "ppo.kl_kind=k3"],
    ),
    "unbiased kl": Case(
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
        ["ppo.kl_coef=0.1", "ppo.kl_in=loss", "ppo.kl_kind=k3_unbiased"],
    ),
}
THEIRS = {
    **trl_settings.THEIRS,
    "max_steps": UPDATES,
    "num_iterations": UPDATES,
    "per_device_train_batch_size": SIZES.responses,
    "num_generations": SIZES.group,
    "max_completion_length": SIZES.longest,
    "temperature": 1.0,
    "beta": 0.0,
}
OURS = [
    *trl_settings.OURS,
    f"seed={SEED}",
    f"reward.fn={ROOT / 'benchmarks' / 'peers' / 'letters.py'}:count",
    f"reward.options.letter={LETTER}",
    f"rollout.n={SIZES.group}",
    f"rollout.max_new_tokens={SIZES.longest}",
    f"ppo.rollouts={SIZES.responses}",
    f"ppo.inner_epochs={UPDATES}",
    "ppo.kl_coef=0",
    "ppo.stop_at_kl=null",
    f"trainer.global_batch_size={SIZES.responses}",
    f"trainer.micro_batch_size={SIZES.responses}",
    "trainer.max_phases=1",
]


def stored(found: dict[str, Any], folder: Path) -> None:
    """Write TRL's responses as the first phase of one of our runs, whose prompts have another order."""
    texts = prompts(SIZES)
    numbers = prompt_order([Prompt(text, (1,), {}) for text in texts], PromptDataConfig(), SEED, 1)
    drawn = numbers.rows(0, SIZES.prompts, 0).tolist()
    by_prompt: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for one in found["responses"][0]:
        by_prompt.setdefault(tuple(one["prompt"]), []).append(one)
    assert len(by_prompt) == SIZES.prompts
    ids = {text: tuple(LETTERS.index(letter) for letter in text) for text in texts}
    rollouts = []
    for position, index in enumerate(drawn):
        for sample, one in enumerate(by_prompt[ids[texts[index]]]):
            reason = "eos" if one["response"][-1] == len(LETTERS) + 1 else "length"
            logprobs = [min(value, 0.0) for value in one["logprobs"]]
            rollouts.append(Rollout(position, sample, one["prompt"], one["response"], logprobs, reason))
    dump(phase_file(folder, TRAINING, 0), rollouts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES)
    return folder


@pytest.mark.gate
@pytest.mark.parametrize("name", CASES)
def test_updates_with_replayed_responses_are_those_of_trl(
    name: str, worlds: Worlds, trl_python: Path, model: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    worth = 1.0 if case.theirs.get("scale_rewards") == "none" else WORTH
    settings = {**THEIRS, **case.theirs}
    job = {"model": str(model), "prompts": prompts(SIZES), "letter": LETTER, "worth": worth, "settings": settings}
    (tmp_path / "job.json").write_text(json.dumps(job))
    away = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    run(trl_python, SCRIPT, tmp_path / "job.json", tmp_path / "found.json", cwd=tmp_path, timeout=900, **away)
    found = json.loads((tmp_path / "found.json").read_text())
    stored(found, tmp_path / "dump")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(SIZES)))
    presets = [setting for setting in case.ours if setting.startswith("+")]
    own = [*(setting for setting in case.ours if not setting.startswith("+")), f"reward.options.worth={worth}"]
    watched = tmp_path / "updates.jsonl"
    argv = [*presets, *OURS, *own, f"model.path={model}", f"data.train=[{data}]", f"run.dir={tmp_path}/run"]
    worlds.run(1, train_watched, [*argv, f"rollout.replay={tmp_path / 'dump'}"], watched)
    ours = updates(watched, "train/loss", "train/grad_norm")
    assert len(ours) == len(found["steps"]) == UPDATES
    losses = [loss for loss, _ in ours]
    assert losses == pytest.approx([step["loss"] for step in found["steps"]], rel=LOSS_TOLERANCE, abs=2e-6)
    norms = [norm for _, norm in ours]
    assert norms == pytest.approx([step["grad_norm"] for step in found["steps"]], rel=1e-3)
    assert max(losses) - min(losses) > 1e-3, "training changes the loss"


def train_watched(settings: list[str], path: Path) -> None:
    """Train, and write the metrics of each update to a file."""
    with updates_written_to(path):
        train("grpo", settings)


@pytest.mark.gate
@pytest.mark.timeout(1800)
def test_responses_per_cpu_second_are_twice_those_of_trl(trl_python: Path) -> None:
    benchmark = ("-m", "benchmarks.grpo", "--trl", trl_python, "--least", "2")
    run(sys.executable, *benchmark, cwd=ROOT, timeout=1700)
