"""Rollouts on disk: exact, whole, and only for the requests they answer."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ConfigError, DataError
from megarl.rollout.noise import EVALUATION, TRAINING
from megarl.rollout.requests import Request, Rollout
from megarl.rollout.stored import FORMAT, dump, load, phase_file, replay, require_phases
from tests.refusals import refused


def some_rollouts() -> list[Rollout]:
    dice = random.Random(1)
    floats = [-math.pi, -1e-45, -3.4028234663852886e38, -0.1, 0.0, *(-dice.random() for _ in range(50))]
    return [
        Rollout(0, 0, [1, 2], list(range(len(floats))), floats, "length", 3),
        Rollout(0, 1, [1, 2], [5], [-0.25], "eos", 3),
        Rollout(7, 0, [9], [2**40], [-1.0], "stop", 4),
    ]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "phase.jsonl"
    dump(path, some_rollouts())
    assert load(path) == some_rollouts()
    assert [item.name for item in path.parent.iterdir()] == ["phase.jsonl"]


@pytest.mark.parametrize(
    ("change", "line", "is_json"),
    [
        (lambda text: text.replace('"sample_id": 1', '"sample": 1'), 3, True),
        (lambda text: text.replace("[-0.25]", "[-0.25, 1]"), 3, True),
        (lambda text: text[:-20] + "\n", 4, False),
        (lambda text: "", 1, False),
        (lambda text: text.replace("[-0.25]", '["x"]'), 3, True),
        (lambda text: text.replace("[-0.25]", "[NaN]"), 3, True),
        (lambda text: text.replace("[-0.25]", "3"), 3, True),
        (lambda text: text.replace("[5]", "[-5]"), 3, True),
        (lambda text: text.replace("[5]", "[5.5]"), 3, True),
        (lambda text: text.replace('"eos"', '["eos"]'), 3, True),
        (lambda text: text.replace("[9]", "[]"), 4, True),
        (lambda text: text.replace("[9]", "[" + "9" * 5000 + "]"), 4, False),
        (lambda text: text.replace("[9]", "[" * 100_000), 4, False),
    ],
)
def test_a_line_that_is_no_rollout_is_refused(change: Any, line: int, is_json: bool, tmp_path: Path) -> None:
    path = tmp_path / "phase.jsonl"
    dump(path, some_rollouts())
    path.write_text(change(path.read_text()))
    with refused(DataError, where=f"{path}:{line}") as found:
        load(path)
    assert ("JSON" in found.line) != is_json


def test_a_file_that_is_torn_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "phase.jsonl"
    dump(path, some_rollouts())
    whole = path.read_text()
    path.write_text("\n".join(whole.splitlines()[:-1]))
    with refused(DataError, key="rollouts", value=3, where=str(path), names=("2 of 3",)):
        load(path)
    path.write_text(whole.replace(FORMAT, "megarl rollouts 0"))
    with refused(DataError, where=str(path), names=(FORMAT,)):
        load(path)


def test_a_dump_that_lacks_a_phase_is_refused_by_the_files_name(tmp_path: Path) -> None:
    for stream, phase in ((TRAINING, 0), (TRAINING, 1), (EVALUATION, 1)):
        dump(phase_file(tmp_path, stream, phase), some_rollouts())
    require_phases(tmp_path, {TRAINING: range(2), EVALUATION: [1]})
    with refused(
        ConfigError,
        key="rollout.replay",
        value=tmp_path,
        where="train-000002.jsonl",
        offers={"rollout.replay": [None]},
        names=("trainer.max_phases", "trainer.eval_every"),
    ):
        require_phases(tmp_path, {TRAINING: range(1, 4), EVALUATION: [2]})


def test_a_replay_answers_the_requests_of_its_phase_and_no_others(tmp_path: Path) -> None:
    dump(phase_file(tmp_path, TRAINING, 12), some_rollouts())
    requests = [Request(7, 0, (9,)), Request(0, 1, (1, 2)), Request(0, 0, (1, 2))]
    assert replay(tmp_path, TRAINING, 12, requests) == some_rollouts()
    for stream, phase, where in ((EVALUATION, 12, "eval-000012.jsonl"), (TRAINING, 13, "train-000013.jsonl")):
        offers = {"rollout.replay": [None]}
        with refused(ConfigError, key="rollout.replay", value=tmp_path, where=where, offers=offers):
            replay(tmp_path, stream, phase, requests)
    for asked, names in ((Request(0, 2, (1, 2)), ("prompt 0", "sample 2")), (Request(0, 0, (1, 3)), ("sample 0",))):
        where = str(phase_file(tmp_path, TRAINING, 12))
        with refused(ConfigError, key="rollout.replay", value=tmp_path, where=where, offers={}, names=names):
            replay(tmp_path, TRAINING, 12, [asked])
