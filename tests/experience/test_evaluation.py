"""Evaluations: which responses are drawn for which value of a setting, and under which names their means are logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megarl.callbacks.samples import as_table
from megarl.config.sections.evaluation import EvalConfig, SweepConfig
from megarl.data.prompts import Prompt
from megarl.experience.evaluation import Evaluation
from megarl.rewards.scores import Scores
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcd")
PROMPTS = [Prompt("a", (0,), {}), Prompt("b", (1,), {})]


class Respond:
    """Answers a prompt with as many letters as ten times the temperature says, and an end of sequence."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, dict[str, float]]] = []

    def __call__(
        self, prompts: list[Prompt], n: int, *, stream: int, phase: int, temperature: float = 0.1
    ) -> list[Rollout]:
        self.asked.append((n, stream, phase, {"temperature": temperature}))
        response = [2] * round(10 * temperature) + [TOKENIZER.eos_id]
        logprobs = [-1.0] * len(response)
        return [
            Rollout(number, sample, list(prompt.tokens), response, logprobs, "eos")
            for number, prompt in enumerate(prompts)
            for sample in range(n)
        ]


class Lengths:
    """Scores by the number of letters, plus a bonus; `without` of the first samples have no score."""

    def __init__(self, bonus: float = 0.0, without: int = 0, parts: bool = False) -> None:
        self.bonus, self.without, self.parts = bonus, without, parts
        self.asked: list[tuple[int, int]] = []
        self.closed = 0

    def score(self, prompts: list[Prompt], rollouts: list[Rollout], *, stream: int, phase: int) -> Scores:
        self.asked.append((stream, phase))
        scores = [len(rollout.response) - 1 + self.bonus + rollout.prompt_id for rollout in rollouts]
        given = [None if row < self.without else score for row, score in enumerate(scores)]
        halves = {"half": [None if score is None else score / 2 for score in given]}
        return Scores(values=list(given), parts=halves if self.parts else {})

    def close(self) -> None:
        self.closed += 1


def evaluation(judges: dict[str, Any], **settings: Any) -> tuple[Evaluation, Respond]:
    respond = Respond()
    return Evaluation(respond, PROMPTS, judges, EvalConfig(**settings), TOKENIZER), respond


def test_means_are_logged_under_the_judges_names() -> None:
    it, respond = evaluation({"score": Lengths(), "optimality": Lengths(bonus=2.0)}, n=3)
    found = it.run(phase=7)
    best = {"eval/best@1": 1.5, "eval/best@2": 1.5, "eval/best@3": 1.5}
    errors = dict.fromkeys(("eval/score_se", "eval/best@1_se", "eval/best@2_se", "eval/best@3_se"), 0.5)
    means = {"eval/score": 1.5, "eval/optimality": 3.5, "eval/response_tokens": 2.0}
    assert found.metrics == pytest.approx({**means, **best, **errors})
    assert respond.asked == [(3, EVALUATION, 7, {"temperature": 0.1})]


def test_parts_of_a_weighted_sum_have_means_of_their_own() -> None:
    it, _ = evaluation({"score": Lengths(parts=True)})  # type: ignore[arg-type]
    assert it.run(0).metrics["eval/score/half"] == 0.75


class Named(Lengths):
    """A metric whose parts have the names of what evaluations log anyway."""

    def score(self, prompts: list[Prompt], rollouts: list[Rollout], *, stream: int, phase: int) -> Scores:
        ones = [1.0 for _ in rollouts]
        return Scores(values=list(ones), parts={"score": list(ones), "response_tokens": list(ones)})


def test_a_metrics_part_does_not_take_the_place_of_the_score() -> None:
    metrics = evaluation({"score": Lengths(bonus=5.0), "quality": Named()})[0].run(0).metrics
    assert metrics["eval/score"] == 6.5
    assert metrics["eval/response_tokens"] == 2.0
    assert (metrics["eval/score_metric"], metrics["eval/response_tokens_metric"]) == (1.0, 1.0)


def test_a_sweep_names_each_value_and_draws_and_scores_it_apart() -> None:
    judge = Lengths()
    it, respond = evaluation({"optimality": judge}, sweep=SweepConfig(temperature=[0.0, 0.7, 1.0]))
    found = it.run(phase=2)
    assert found.metrics == {
        "eval/optimality@temperature=0": 0.5,
        "eval/response_tokens@temperature=0": 1.0,
        "eval/optimality@temperature=0.7": 7.5,
        "eval/response_tokens@temperature=0.7": 8.0,
        "eval/optimality@temperature=1": 10.5,
        "eval/response_tokens@temperature=1": 11.0,
    }
    streams = [stream for _, stream, _, _ in respond.asked]
    assert streams == [stream for stream, _ in judge.asked]
    assert len(set(streams)) == 3
    assert streams[0] == EVALUATION
    assert {row["setting"] for row in found.samples} == {"temperature=0", "temperature=0.7", "temperature=1"}


class Listed(Lengths):
    """Scores responses by a list, prompt after prompt."""

    def __init__(self, scores: list[float | None]) -> None:
        super().__init__()
        self.listed = scores

    def score(self, prompts: list[Prompt], rollouts: list[Rollout], *, stream: int, phase: int) -> Scores:
        return Scores(values=list(self.listed))


def test_a_vote_is_of_the_responses_with_a_score() -> None:
    answers = iter(["x", "x", "y", "y", "y"])
    seen: list[str] = []

    def read(texts: Sequence[str]) -> list[str]:
        seen.extend(texts)
        return [next(answers) for _ in texts]

    scorer = Listed([1.0, 1.0, 0.0, None, 0.0, 0.0])
    respond = Respond()
    settings = EvalConfig(n=3, vote="text", sweep=SweepConfig(temperature=[0.2]))
    found = Evaluation(respond, PROMPTS, {"score": scorer}, settings, TOKENIZER, read).run(0).metrics  # type: ignore[dict-item]
    assert seen == ["cc"] * 5, "decoded without EOS, and not the one without a score"
    assert found["eval/vote@temperature=0.2"] == 0.5
    assert found["eval/vote_se@temperature=0.2"] == 0.5
    assert found["eval/pass@2@temperature=0.2"] == 0.5
    assert "eval/pass@3_se@temperature=0.2" not in found, "one prompt has three scores"
    assert found["eval/pass@3@temperature=0.2"] == 1.0


def test_samples_without_a_score_count_in_no_mean() -> None:
    it, _ = evaluation({"score": Lengths(without=1), "metric": Lengths(without=2)})
    found = it.run(0)
    assert found.metrics["eval/score"] == 2.0
    assert "eval/metric" not in found.metrics
    assert [row["score"] for row in found.samples] == [None, 2.0]


@pytest.mark.parametrize(("table", "rows"), [(0, 0), (1, 1), (9, 2)])
def test_the_table_shows_what_was_said_and_what_it_was_worth(table: int, rows: int) -> None:
    it, _ = evaluation({"score": Lengths()}, table=table)
    samples = it.run(0).samples
    whole = [{"prompt": "a", "response": "c", "score": 1.0}, {"prompt": "b", "response": "c", "score": 2.0}]
    assert samples == whole[:rows]


def test_a_table_is_plain_text_and_takes_no_response_for_markup() -> None:
    rows = [{"prompt": "p", "response": "[bold]x[/bold] [/oops]", "score": 0.123456}]
    shown = as_table(rows)
    assert "[bold]x[/bold] [/oops]" in shown
    assert "0.1235" in shown
    assert "\x1b" not in shown
