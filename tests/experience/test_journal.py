"""Scores on disk: there as soon as they are known, found for the very responses they were given to, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megarl.errors import DataError
from megarl.experience.journal import Journal, identity
from megarl.rollout.noise import EVALUATION, TRAINING
from megarl.rollout.requests import Rollout
from megarl.rollout.stored import dump, load, phase_file
from tests.refusals import refused

ONE = Rollout(0, 0, [5], [6, 7], [-0.1, -0.2], "eos")
TWO = Rollout(0, 1, [5], [6], [-0.1], "length")
SCORES = {identity(ONE): (0.1 + 0.2, {"a": 1.0}), identity(TWO): ([1.0, -2.5], {"a": None})}


def written(folder: Path, name: str = "reward", function: str = "") -> Journal:
    journal = Journal(folder, name, function)
    journal.write(TRAINING, 3, [identity(ONE), identity(TWO)], [0.1 + 0.2, [1.0, -2.5]], {"a": [1.0, None]})
    return journal


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    assert written(tmp_path / "new").read(TRAINING, 3) == SCORES


def test_a_sample_that_was_dropped_is_remembered_as_that(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "reward")
    journal.write(TRAINING, 0, [identity(ONE)], [None], {})
    assert journal.read(TRAINING, 0) == {identity(ONE): (None, {})}


def test_each_stream_phase_and_question_has_scores_of_its_own(tmp_path: Path) -> None:
    journal = written(tmp_path)
    assert journal.read(TRAINING, 2) == {}
    assert journal.read(EVALUATION, 3) == {}
    assert journal.read(EVALUATION + 1, 3) == {}
    assert Journal(tmp_path, "metric").read(TRAINING, 3) == {}


@pytest.mark.parametrize(
    "other",
    [
        replace(ONE, response=[6, 8]),
        replace(ONE, prompt=[4]),
        replace(ONE, prompt=[5, 6], response=[7]),
        replace(ONE, sample_id=1),
        replace(ONE, prompt_id=1),
    ],
)
def test_another_response_has_no_score(other: Rollout, tmp_path: Path) -> None:
    assert identity(other) not in written(tmp_path).read(TRAINING, 3)


def test_the_same_response_to_a_changed_record_has_no_score() -> None:
    assert len({identity(ONE), identity(ONE, {"answer": "4"}), identity(ONE, {"answer": "5"})}) == 3
    assert identity(ONE, {"a": 1, "b": 2}) == identity(ONE, {"b": 2, "a": 1})


def test_the_same_response_drawn_by_other_weights_has_its_score(tmp_path: Path) -> None:
    same = replace(ONE, logprobs=[-9.0, -9.0], weights_version=8)
    assert identity(same) in written(tmp_path).read(TRAINING, 3)


def test_scores_of_another_function_are_not_taken(tmp_path: Path) -> None:
    written(tmp_path, function="before")
    assert Journal(tmp_path, "reward", "after").read(TRAINING, 3) == {}
    assert Journal(tmp_path, "reward", "before").read(TRAINING, 3) == SCORES


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_does_not_count_and_costs_no_other(cut: int, tmp_path: Path) -> None:
    journal = written(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert journal.read(TRAINING, 3) == {identity(ONE): SCORES[identity(ONE)]}
    journal.write(TRAINING, 3, [identity(TWO)], [2.0], {})
    assert journal.read(TRAINING, 3) == {identity(ONE): SCORES[identity(ONE)], identity(TWO): (2.0, {})}


def test_a_line_that_lacks_only_its_end_counts_and_the_next_begins_a_new_one(tmp_path: Path) -> None:
    journal = written(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert journal.read(TRAINING, 3) == SCORES
    third = replace(TWO, sample_id=2)
    journal.write(TRAINING, 3, [identity(third)], [3.0], {})
    assert journal.read(TRAINING, 3) == {**SCORES, identity(third): (3.0, {})}


def test_phases_that_lie_behind_are_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "reward")
    metric = Journal(tmp_path, "metric")
    for phase in (0, 9, 10, 11):
        for stream in (TRAINING, EVALUATION, EVALUATION + 1):
            journal.write(stream, phase, [identity(ONE)], [1.0], {})
        metric.write(TRAINING, phase, [identity(ONE)], [1.0], {})
    journal.forget(before=10)
    assert [bool(journal.read(TRAINING, phase)) for phase in (0, 9, 10, 11)] == [False, False, True, True]
    assert [bool(journal.read(EVALUATION + 1, phase)) for phase in (9, 10)] == [False, True]
    assert metric.read(TRAINING, 0)


def test_a_dump_of_rollouts_holds_their_scores_which_a_replay_then_knows(tmp_path: Path) -> None:
    stored = tmp_path / "dump"
    dump(phase_file(stored, TRAINING, 3), [ONE, TWO])
    Journal(tmp_path / "first", "reward", copy=stored).write(
        TRAINING, 3, [identity(ONE), identity(TWO)], [1.0, 2.0], {}
    )
    assert load(phase_file(stored, TRAINING, 3)) == [ONE, TWO]
    again = Journal(tmp_path / "second", "reward", source=stored)
    assert again.read(TRAINING, 3) == {identity(ONE): (1.0, {}), identity(TWO): (2.0, {})}
    again.write(TRAINING, 3, [identity(ONE)], [5.0], {})
    assert again.read(TRAINING, 3)[identity(ONE)] == (5.0, {}), "what this run was told goes before"
    assert Journal(tmp_path / "third", "reward", source=stored).read(TRAINING, 3)[identity(ONE)] == (1.0, {})


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"123",
            b"null",
            b'{"x":1}',
            b"\xff\xfe",
            b"[1]",
            b'"a"',
            b"{",
            b"\0\0",
            b"[" * 100_000,
            b'{"n":' + b"1" * 5000,
        ),
        b'{"of": [1], "score": 1.0, "parts": {}, "by": ""}',
        b'{"of": "a", "score": "1", "parts": {}, "by": ""}',
        b'{"of": "a", "score": NaN, "parts": {}, "by": ""}',
        b'{"of": "a", "score": [], "parts": {}, "by": ""}',
        b'{"of": "a", "score": [1, "x"], "parts": {}, "by": ""}',
        b'{"of": "a", "score": true, "parts": {}, "by": ""}',
        b'{"of": "a", "score": 1.0, "parts": [], "by": ""}',
        b'{"of": "a", "score": 1.0, "parts": {"p": "x"}, "by": ""}',
        b'{"of": "a", "score": 1.0, "by": ""}',
    ],
    ids=range(19),
)
def test_a_line_that_is_no_score_is_passed_over_with_a_warning(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = written(tmp_path)
    path = next(tmp_path.glob("reward-*.jsonl"))
    before = path.read_bytes()
    path.write_bytes(line + b"\n" + before)
    assert journal.read(TRAINING, 3) == SCORES
    assert f"{path}: line 1 is not a valid score" in caplog.text
    path.write_bytes(before + line)  # as when a process ends within a line
    written(tmp_path)
    assert journal.read(TRAINING, 3) == SCORES


@pytest.mark.parametrize(
    "name", ["reward-backup.jsonl", "reward-train-x.jsonl", "reward-train-000000.jsonl.bak", "reward-.jsonl"]
)
def test_files_of_others_in_the_folder_are_left_alone(name: str, tmp_path: Path) -> None:
    journal = written(tmp_path)
    (tmp_path / name).write_text("mine")
    journal.forget(before=10)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_scores_that_cannot_be_kept_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "reward-train-000003.jsonl").mkdir()
    with refused(DataError, where="reward-train-000003.jsonl"):
        written(tmp_path)
