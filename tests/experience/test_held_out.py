"""Evaluations in chunks: what is asked of the generator and of the scorers, also by one that continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.compose import compose
from megarl.config.sections.evaluation import EvalConfig, SweepConfig
from megarl.data.prompts import Prompt
from megarl.experience.held_out import HeldOut, result_of, stored_settings
from megarl.experience.results import Results
from megarl.rewards.scores import Scores, joined
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefghij")
PROMPTS = [Prompt(letter, (number,), {}) for number, letter in enumerate("abcde")]
N = 2
GRID: Any = SimpleNamespace(run_on_rank0=lambda work: work())


class Responds:
    def __init__(self) -> None:
        self.asked: list[tuple[range, int, dict[str, float]]] = []

    def __call__(self, chunk: range, stream: int, changes: Mapping[str, float]) -> list[Rollout]:
        self.asked.append((chunk, stream, dict(changes)))
        return [
            Rollout(number, sample, [number], [sample] * (stream + number), [-0.5] * (stream + number), "length")
            for number in chunk
            for sample in range(N)
        ]


class Scores01:
    """Scores the first sample of a prompt with 1; fails after `most` calls."""

    name = "score"

    def __init__(self, most: int = 99, fingerprint: str = "f") -> None:
        self.most, self.fingerprint = most, fingerprint
        self.asked: list[tuple[list[int], int, int]] = []

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append(([rollout.prompt_id for rollout in rollouts], stream, phase))
        values = [float(rollout.sample_id == 0) for rollout in rollouts]
        return Scores(list(values), {"twice": [2 * value for value in values]})

    def close(self) -> None:
        pass


class DropsFirst(Scores01):
    """Gives the first response to the first prompt no score."""

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        found = super().score(prompts, rollouts, stream=stream, phase=phase)
        if phase == 0:
            found.values[0] = None
        return found


def held_out(folder: Path, respond: Responds, scorer: Any, *, drops: bool = False, **settings: Any) -> HeldOut:
    config = EvalConfig(n=N, **settings)
    results = Results(folder, {})
    return HeldOut(respond, PROMPTS, {"score": scorer}, config, TOKENIZER, GRID, results, chunk=2, drops=drops)


def test_prompts_are_answered_and_scored_in_chunks_and_measured_together(tmp_path: Path) -> None:
    respond, scorer = Responds(), Scores01()
    (found,) = held_out(tmp_path, respond, scorer).run()
    assert respond.asked == [
        (range(0, 2), EVALUATION, {}),
        (range(2, 4), EVALUATION, {}),
        (range(4, 5), EVALUATION, {}),
    ]
    assert [(stream, chunk) for _, stream, chunk in scorer.asked] == [(EVALUATION, chunk) for chunk in range(3)]
    assert [rollout.prompt_id for rollout in found.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.metrics["eval/score"] == 0.5
    assert found.metrics["eval/score/twice"] == 1.0
    assert found.metrics["eval/pass@1"] == 0.5
    assert found.metrics["eval/pass@2"] == 1.0
    assert found.metrics["eval/score_se"] == 0.0, "the scores of every prompt have the mean 0.5"


def test_an_interrupted_evaluation_computes_only_what_is_missing(tmp_path: Path) -> None:
    whole = held_out(tmp_path / "whole", Responds(), Scores01(), sweep=SweepConfig(temperature=[0.5, 1.0])).run()
    cut = tmp_path / "cut"
    sweep = SweepConfig(temperature=[0.5, 1.0])
    with pytest.raises(KeyboardInterrupt):
        held_out(cut, Responds(), Scores01(most=4), sweep=sweep).run()
    respond, scorer = Responds(), Scores01()
    again = held_out(cut, respond, scorer, sweep=sweep)
    found = again.run()
    assert respond.asked == [(range(4, 5), EVALUATION + 1, {"temperature": 1.0})], "responses were kept unscored, too"
    assert [(stream, chunk) for _, stream, chunk in scorer.asked] == [(EVALUATION + 1, 1), (EVALUATION + 1, 2)]
    assert found == whole
    assert result_of(found, PROMPTS)["responses"] == 2 * len(PROMPTS) * N
    assert "eval/score@temperature=0.5" in result_of(found, PROMPTS)["metrics"]


def test_another_scorer_scores_the_responses_that_are_there(tmp_path: Path) -> None:
    held_out(tmp_path, Responds(), Scores01()).run()
    respond, scorer = Responds(), Scores01(fingerprint="g")
    held_out(tmp_path, respond, scorer).run()
    assert respond.asked == []
    assert len(scorer.asked) == 3


@pytest.mark.parametrize(("drops", "scored_again"), [(True, []), (False, [0])])
def test_a_chunk_that_lacks_scores_is_scored_again_unless_responses_are_dropped(
    drops: bool, scored_again: list[int], tmp_path: Path
) -> None:
    (before,) = held_out(tmp_path, Responds(), DropsFirst(), drops=True).run()
    assert before.scored["score"].dropped == 1
    scorer = Scores01()
    (found,) = held_out(tmp_path, Responds(), scorer, drops=drops).run()
    assert [chunk for _, _, chunk in scorer.asked] == scored_again
    assert found.scored["score"].dropped == (1 if drops else 0)
    later = Scores01()
    held_out(tmp_path, Responds(), later, drops=False).run()
    assert [chunk for _, _, chunk in later.asked] == ([0] if drops else []), "the new scores are stored"


def test_a_sample_line_has_texts_length_logprob_and_scores(tmp_path: Path) -> None:
    it = held_out(tmp_path, Responds(), Scores01())
    (found,) = it.run()
    line = it.lines(found)[3]
    assert line == {
        "prompt_id": 1,
        "sample_id": 1,
        "where": "",
        "prompt": "b",
        "response": "bb",
        "finish_reason": "length",
        "tokens": 2,
        "logprob": -1.0,
        "scores": {"score": 0.0},
        "components": {"score": {"twice": 0.0}},
    }


class ScoresTens(Scores01):
    """A metric with components of the same names as those of `Scores01`, and other values."""

    name = "metric"

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        return Scores([0.0] * len(rollouts), {"twice": [10.0] * len(rollouts)})


class Plain(Scores01):
    """A metric without components."""

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        return Scores([0.5] * len(rollouts))


def test_components_of_the_reward_and_of_a_metric_are_kept_apart(tmp_path: Path) -> None:
    scorers: Any = {"score": Scores01(), "metric": ScoresTens(), "plain": Plain()}
    it = HeldOut(
        Responds(), PROMPTS, scorers, EvalConfig(n=N), TOKENIZER, GRID, Results(tmp_path, {}), chunk=2, drops=False
    )
    (found,) = it.run()
    line = it.lines(found)[0]
    assert line["scores"] == {"score": 1.0, "metric": 0.0, "plain": 0.5}
    assert line["components"] == {"score": {"twice": 2.0}, "metric": {"twice": 10.0}}


def test_the_stored_settings_do_not_contain_where_and_how_fast_something_is_computed() -> None:
    score = ["model.path=model", "data.eval=[a.jsonl]", "reward.fn=a:b"]
    plain, _ = compose("evaluate", score)
    elsewhere = ["rollout.engine.layout=tp2", "rollout.engine.slots=5", "reward.calls.devices='0'", "parallel.tp=2"]
    other, _ = compose("evaluate", [*score, *elsewhere])
    stored = stored_settings(plain)
    assert stored == stored_settings(other)
    assert stored.keys() == {"data", "rollout", "reward", "metric", "eval"}
    assert stored["rollout"]["temperature"] == 1.0
    # A time-out decides which responses have a score.
    later, _ = compose("evaluate", [*score, "reward.calls.timeout=1"])
    assert stored != stored_settings(later)


def test_joined_scores_have_every_component() -> None:
    found = joined([Scores([1.0], {"a": [2.0]}, failed_calls=1), Scores([None, 3.0], {}, repeated_calls=2)])
    assert found == Scores([1.0, None, 3.0], {"a": [2.0, None, None]}, failed_calls=1, repeated_calls=2)
