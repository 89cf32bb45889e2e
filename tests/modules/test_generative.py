"""What is refused about prompts before there are models: lengths, fields, and phases that a replay lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.ppo import PPOConfig
from megarl.errors import ConfigError, DataError
from megarl.modules.generative import GenerativeModule
from megarl.rollout.noise import EVALUATION, TRAINING
from megarl.rollout.stored import dump, phase_file
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

Make = Callable[..., GenerativeModule]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A module with room for 8 tokens, trained on `train` and evaluated on `held_out`."""

    def module(train: list[Any], held_out: list[Any], **rollout: Any) -> GenerativeModule:
        config = PPOConfig()
        config.model.max_positions, config.rollout.max_new_tokens = 12, 4
        config.reward.fn = "rewards.py:score"
        for key, value in rollout.items():
            setattr(config.rollout, key, value)
        for name, records in (("train", train), ("eval", held_out)):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            setattr(config.data, name, [str(path)] if records else [])
        made = GenerativeModule(config, ByteTokenizer(), None)
        made.vocab_size = ByteTokenizer().size
        made.prepare_prompts(train=True)
        return made

    return module


def test_prompts_of_phases_and_of_evaluations_are_measured(make: Make) -> None:
    short, long = {"prompt": "a"}, {"prompt": "a" * 9}
    made = make([short, long], [long, short, short], too_long="drop")
    assert (len(made.prompts), len(made.eval_prompts)) == (1, 2)
    for train, held_out, where in (([short, long], [], "train.jsonl:2"), ([short], [short, long], "eval.jsonl:2")):
        with refused(DataError, names=(f"{where}: ", "9")):
            make(train, held_out)


def test_a_field_by_the_name_of_what_functions_are_given_is_refused_by_file_and_line(make: Make) -> None:
    with refused(DataError, key="samples", where="eval.jsonl:2", names=("reward.fn",)):
        make([{"prompt": "a"}], [{"prompt": "a"}, {"prompt": "b", "samples": 1}])


def test_a_replay_must_hold_every_phase_and_evaluation_that_is_to_come(make: Make, tmp_path: Path) -> None:
    made = make([{"prompt": "a"}], [{"prompt": "b"}], replay=str(tmp_path))
    made.config.trainer.eval_every, made.planned, made.steps_done = 2, 5, 2
    made.evaluation = SimpleNamespace(changes=[{}, {}])  # type: ignore[assignment]
    wanted = [(TRAINING, 2), (TRAINING, 3), (TRAINING, 4), (EVALUATION, 4), (EVALUATION + 1, 4)]
    for stream, phase in wanted:
        with refused(ConfigError, names=("rollout.replay",)):
            made.on_train_start()
        dump(phase_file(tmp_path, stream, phase), [])
    made.on_train_start()
