"""Evaluation by generation: responses to held-out prompts with their scores and metrics, for each value of a sweep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.config.sections.evaluation import EvalConfig
from megarl.data.prompts import Prompt
from megarl.experience.measures import Answer, measures
from megarl.experience.scorers import Scorer, unique_metric_name
from megarl.parallel.grid import Grid
from megarl.rewards import extract
from megarl.rewards.scores import Scores, joined, total
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

# collect(prompts, n, stream=, phase=, **{setting: value}) -> rollouts
Collect = Callable[..., list[Rollout]]
ReadAnswers = Callable[[Sequence[str]], Sequence[Answer]]
"""Returns the answer in each text, for majority votes; the same on every rank."""
SCORE = "eval/score"


@dataclass
class Measured:
    """All responses to the prompts with one value of the sweep.

    Attributes:
        changes: the value, by the name of the setting; empty without a sweep.
        rollouts: the responses, sorted by (prompt_id, sample_id).
        scored: their scores, by the name of the scorer.
        metrics: means and measures, by logged name without the value.
    """

    changes: dict[str, float]
    rollouts: list[Rollout] = field(default_factory=list)
    scored: dict[str, Scores] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluated:
    """The result of an evaluation: `metrics` by logged name, `samples` as rows of a table."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Sweep(ABC):
    """Responses to prompts with their scores and measures, for each value of a sweep.

    Responses are collected and scored in chunks. Generators and scorers know a chunk by its random stream, one for each
    value, and by its number, which they take for a phase. Every rank calls this, and every rank gets the same result.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        scorers: Mapping[str, Scorer],
        settings: EvalConfig,
        tokenizer: Tokenizer,
        read_answers: ReadAnswers | None = None,
    ) -> None:
        """
        Args:
            prompts: all prompts.
            scorers: by the name of the logged mean, `score` for the reward.
            settings: the section `eval`.
            tokenizer: decodes responses.
            read_answers: the answers that responses vote on; None for no vote.
        """
        self.prompts, self.scorers, self.settings = prompts, scorers, settings
        self.tokenizer, self.read_answers = tokenizer, read_answers
        self.changes = changes_of(settings)

    @abstractmethod
    def _rollouts(self, stream: int, number: int, changes: dict[str, float]) -> list[Rollout]:
        """Return the responses of a chunk."""

    def _scores(self, stream: int, number: int, scorer: str, rollouts: list[Rollout]) -> Scores:
        """Return the scores of a chunk's responses by the scorer of that name."""
        return self.scorers[scorer].score(self.prompts, rollouts, stream=stream, phase=number)

    def _measured(self, stream: int, changes: dict[str, float], numbers: Iterable[int]) -> Measured:
        """Collect, score and measure the responses with one value of the sweep, chunk by chunk."""
        found = Measured(changes)
        chunks: dict[str, list[Scores]] = {scorer: [] for scorer in self.scorers}
        for number in numbers:
            rollouts = self._rollouts(stream, number, changes)
            found.rollouts += rollouts
            for scorer, scores in chunks.items():
                scores.append(self._scores(stream, number, scorer, rollouts))
        found.scored = {scorer: joined(scores) for scorer, scores in chunks.items()}
        found.metrics = metrics_of(found.rollouts, found.scored, self.tokenizer, self.read_answers)
        return found

    def lines(self, found: Measured, most: int | None = None) -> list[dict[str, Any]]:
        """Return a record for each response, or for the first `most`: texts, length, log-prob, scores."""
        records = []
        for row, rollout in enumerate(found.rollouts[:most]):
            prompt = self.prompts[rollout.prompt_id]
            records.append(
                {
                    **found.changes,
                    "prompt_id": rollout.prompt_id,
                    "sample_id": rollout.sample_id,
                    "where": prompt.where,
                    "prompt": prompt.text,
                    "response": self.tokenizer.decode(rollout.response_without_eos),
                    "finish_reason": rollout.finish_reason,
                    "tokens": len(rollout.response),
                    "logprob": sum(rollout.logprobs),
                    "scores": {name: scores.values[row] for name, scores in found.scored.items()},
                    "components": {
                        name: {component: column[row] for component, column in scores.parts.items()}
                        for name, scores in found.scored.items()
                        if scores.parts
                    },
                }
            )
        return records

    def table(self, found: Measured) -> list[dict[str, Any]]:
        """Return a row for each of the first `eval.table` responses: value of the sweep, texts, scores."""
        setting = suffix_of(found.changes).removeprefix("@")
        return [
            {
                **({"setting": setting} if setting else {}),
                "prompt": line["prompt"],
                "response": line["response"],
                **{name: None if score is None else total(score) for name, score in line["scores"].items()},
            }
            for line in self.lines(found, self.settings.table)
        ]


class Evaluation(Sweep):
    """An evaluation during training: all responses to held-out prompts are one chunk, with the number of the phase."""

    def __init__(
        self,
        collect: Collect,
        prompts: Sequence[Prompt],
        scorers: Mapping[str, Scorer],
        settings: EvalConfig,
        tokenizer: Tokenizer,
        read_answers: ReadAnswers | None = None,
    ) -> None:
        """`collect` returns responses; the other arguments are those of every sweep."""
        super().__init__(prompts, scorers, settings, tokenizer, read_answers)
        self.collect = collect

    def run(self, phase: int) -> Evaluated:
        """Collect and score responses to all prompts for each value of the sweep. Keep some as samples to show."""
        evaluated = Evaluated()
        for stream, changes in enumerate(self.changes, EVALUATION):
            found = self._measured(stream, changes, [phase])
            evaluated.metrics |= {name + suffix_of(changes): value for name, value in found.metrics.items()}
            evaluated.samples += self.table(found)
        return evaluated

    def _rollouts(self, stream: int, number: int, changes: dict[str, float]) -> list[Rollout]:
        return self.collect(self.prompts, self.settings.n, stream=stream, phase=number, **changes)


def answer_reader(settings: EvalConfig, grid: Grid) -> ReadAnswers | None:
    """Return what reads the answers for `eval.vote`, on rank 0 and for all ranks; None without a vote."""
    how = settings.vote
    if how is None:
        return None
    return lambda texts: grid.run_on_rank0(lambda: extract.read_answers(how, texts))


def changes_of(settings: EvalConfig) -> list[dict[str, float]]:
    """Return the changes to the settings of generation that an evaluation runs through; one empty change without a
    sweep."""
    for name, values in asdict(settings.sweep).items():
        if values:
            return [{name: value} for value in values]
    return [{}]


def suffix_of(changes: dict[str, float]) -> str:
    """Return what the names of metrics end in for a value of a sweep, as in @temperature=0.7."""
    return "".join(f"@{name}={value:g}" for name, value in changes.items())


def metrics_of(
    rollouts: Sequence[Rollout],
    scored: dict[str, Scores],
    tokenizer: Tokenizer,
    read_answers: ReadAnswers | None = None,
) -> dict[str, float]:
    """Return the means and measures of responses by logged name.

    Args:
        rollouts: the responses, sorted by prompt.
        scored: their scores by name; the measures of several responses per prompt are those of `score`.
        tokenizer: decodes the responses, for the vote.
        read_answers: the answers that responses vote on; None for no vote.
    """
    found: dict[str, float] = {}
    for name, scores in scored.items():
        found |= _means(f"eval/{name}", scores)
    if "score" in scored:
        found |= _measures(rollouts, scored["score"], tokenizer, read_answers)
    lengths = [len(rollout.response) for rollout in rollouts]
    found["eval/response_tokens"] = sum(lengths) / len(lengths)
    return found


def _measures(
    rollouts: Sequence[Rollout], scores: Scores, tokenizer: Tokenizer, read_answers: ReadAnswers | None
) -> dict[str, float]:
    """Return the measures of the scores, grouped by prompt. Responses without a score are left out."""
    given = [
        (rollout, total(score)) for rollout, score in zip(rollouts, scores.values, strict=True) if score is not None
    ]
    groups: dict[int, list[float]] = {}
    for rollout, score in given:
        groups.setdefault(rollout.prompt_id, []).append(score)
    if read_answers is None or all(len(group) < 2 for group in groups.values()):
        return measures(list(groups.values()))
    answers: dict[int, list[Answer]] = {}
    texts = [tokenizer.decode(rollout.response_without_eos) for rollout, _ in given]
    for (rollout, _), answer in zip(given, read_answers(texts), strict=True):
        answers.setdefault(rollout.prompt_id, []).append(answer)
    return measures(list(groups.values()), list(answers.values()))


def _means(name: str, scores: Scores) -> dict[str, float]:
    """Return the mean scores over the samples that have one, and the mean of each component of a combined function."""
    # Each component of a metric function is a metric itself; those of the reward are logged below its name.
    means = {
        f"{SCORE}/{part}" if name == SCORE else f"eval/{unique_metric_name(part)}": mean
        for part, mean in scores.means().items()
    }
    totals = scores.totals()
    if totals and (name == SCORE or not scores.parts):
        means[name] = sum(totals) / len(totals)
    return means
