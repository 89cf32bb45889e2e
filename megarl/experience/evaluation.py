"""Evaluation by generation: responses to held-out prompts with their scores and metrics, for each value of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.config.sections.evaluation import EvalConfig
from megarl.data.prompts import Prompt
from megarl.experience.measures import Answer, measures
from megarl.experience.scorers import Scorer, unique_metric_name
from megarl.parallel.grid import Grid
from megarl.rewards.extract import read_answers
from megarl.rewards.scores import Scores, total
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

# collect(prompts, n, stream=, phase=, **{setting: value}) -> rollouts
Collect = Callable[..., list[Rollout]]
ReadAnswers = Callable[[Sequence[str]], Sequence[Answer]]
"""Returns the answer in each text, for majority votes; the same on every rank."""
SCORE = "eval/score"


@dataclass
class Evaluated:
    """The result of an evaluation: `metrics` by logged name, `samples` as rows of a table."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Evaluation:
    """Collects responses to held-out prompts, scores them, and keeps some as samples to show."""

    def __init__(
        self,
        collect: Collect,
        prompts: Sequence[Prompt],
        scorers: dict[str, Scorer],
        settings: EvalConfig,
        tokenizer: Tokenizer,
        read_answers: ReadAnswers | None = None,
    ) -> None:
        """Expand the sweep. `scorers` maps the name of a logged mean (`score` for the reward) to its scorer."""
        self.collect, self.prompts, self.scorers = collect, prompts, scorers
        self.settings, self.tokenizer, self.read_answers = settings, tokenizer, read_answers
        self.changes = changes_of(settings)

    def run(self, phase: int) -> Evaluated:
        """Collect and score responses to all prompts for each value of the sweep. The result is the same on every
        rank."""
        evaluated = Evaluated()
        # Each value of the sweep has its own stream, which keeps its responses and scores apart.
        for stream, changes in enumerate(self.changes, EVALUATION):
            suffix = suffix_of(changes)
            rollouts = self.collect(self.prompts, self.settings.n, stream=stream, phase=phase, **changes)
            scored = {
                name: scorer.score(self.prompts, rollouts, stream=stream, phase=phase)
                for name, scorer in self.scorers.items()
            }
            found = metrics_of(rollouts, scored, self.tokenizer, self.read_answers)
            evaluated.metrics |= {name + suffix: value for name, value in found.items()}
            evaluated.samples += self._rows(rollouts, scored, suffix.removeprefix("@"))
        return evaluated

    def _rows(self, rollouts: Sequence[Rollout], scored: dict[str, Scores], setting: str) -> list[dict[str, Any]]:
        rows = []
        for row, rollout in enumerate(rollouts[: self.settings.table]):
            by_scorer = {name: scores.values[row] for name, scores in scored.items()}
            rows.append(
                {
                    **({"setting": setting} if setting else {}),
                    "prompt": self.prompts[rollout.prompt_id].text,
                    "response": self.tokenizer.decode(rollout.response_without_eos),
                    **{name: None if score is None else total(score) for name, score in by_scorer.items()},
                }
            )
        return rows


def answer_reader(settings: EvalConfig, grid: Grid) -> ReadAnswers | None:
    """Return what reads the answers for `eval.vote`, on rank 0 and for all ranks; None without a vote."""
    how = settings.vote
    if how is None:
        return None
    return lambda texts: grid.run_on_rank0(lambda: read_answers(how, texts))


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
