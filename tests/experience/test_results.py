"""Results of an evaluation on disk: what is read back, what is computed anew, and what is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ConfigError, DataError
from megarl.experience import results as results_module
from megarl.experience.results import ChunkName, Results
from megarl.rewards.scores import Scores
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from tests.refusals import refused

NAME = ChunkName(EVALUATION + 1, 3)
ROLLOUTS = [Rollout(7, sample, [1, 2], [3, 4], [-0.1, -1 / 3], "length") for sample in range(2)]
SCORES = Scores([0.1, None], {"half": [0.05, None]})


def test_a_chunk_is_read_back_exactly(tmp_path: Path) -> None:
    results = Results(tmp_path, {"seed": 1})
    assert results.rollouts(NAME) is None
    assert results.scores(NAME, "score", "f", 2) is None
    results.keep_rollouts(NAME, ROLLOUTS)
    results.keep_scores(NAME, "score", "f", SCORES)
    again = Results(tmp_path, {"seed": 1})
    assert again.rollouts(NAME) == ROLLOUTS
    assert again.scores(NAME, "score", "f", 2) == SCORES


def test_scores_of_another_function_are_not_used(tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    results.keep_scores(NAME, "score", "f", SCORES)
    assert results.scores(NAME, "score", "g", 2) is None
    assert results.scores(NAME, "metric", "f", 2) is None
    assert results.scores(ChunkName(EVALUATION, 3), "score", "f", 2) is None


def test_a_folder_of_other_settings_is_refused_by_their_names(tmp_path: Path) -> None:
    Results(tmp_path, {"seed": 1, "eval.n": 4, "rollout.stop": ["a"]})
    Results(tmp_path, {"seed": 1, "eval.n": 4, "rollout.stop": ("a",)})
    with refused(ConfigError, key="run.dir", value=str(tmp_path), names=("eval.n", "chunk")) as found:
        Results(tmp_path, {"seed": 1, "eval.n": 8, "rollout.stop": ["a"], "chunk": 2})
    assert "seed" not in found.line


@pytest.mark.parametrize("text", ["", "{", "NaN", "[]", '{"by": "f", "values": [1.0], "parts": {}}'])
def test_a_damaged_file_of_scores_is_named(tmp_path: Path, text: str) -> None:
    results = Results(tmp_path, {})
    results.keep_scores(NAME, "score", "f", SCORES)
    (file,) = (tmp_path / "results").glob("score-*.json")
    file.write_text(text)
    with refused(DataError, where=file.name):
        results.scores(NAME, "score", "f", 2)


@pytest.mark.parametrize("text", [b"", b"{", b'{"format": "megarl rollouts 1", "rollouts": 3}\n', b"\xff"])
def test_a_damaged_file_of_responses_can_be_removed(tmp_path: Path, text: bytes) -> None:
    results = Results(tmp_path, {})
    results.keep_rollouts(NAME, ROLLOUTS)
    (file,) = (tmp_path / "results").glob("*.jsonl")
    file.write_bytes(text)
    with refused(DataError, names=(file.name, "remove")) as found:
        results.rollouts(NAME)
    assert "dump" not in found.line
    file.unlink()
    assert results.rollouts(NAME) is None


def test_a_full_disk_is_reported_with_a_key_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path, {})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results_module, "write_atomically", full)
    monkeypatch.setattr("megarl.rollout.stored.write_atomically", full)
    for write in (
        lambda: results.keep_rollouts(NAME, ROLLOUTS),
        lambda: results.keep_scores(NAME, "score", "f", SCORES),
    ):
        with refused(DataError, key="run.dir", offers={}) as found:
            write()
        assert "rollout.dump" not in found.line
