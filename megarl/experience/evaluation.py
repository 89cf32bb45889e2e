"""Evaluation by generation: responses to held-out prompts with their scores and metrics, for each value of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.config.sections.evaluation import EvalConfig
from megarl.data.prompts import Prompt
from megarl.experience.scorers import Scorer, unique_metric_name
from megarl.rewards.scores import Scores, total
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

# collect(prompts, n, stream=, phase=, **{setting: value}) -> rollouts
Collect = Callable[..., list[Rollout]]
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
    ) -> None:
        """Expand the sweep. `scorers` maps the name of a logged mean (`score` for the reward) to its scorer."""
        self.collect, self.prompts, self.scorers = collect, prompts, scorers
        self.settings, self.tokenizer = settings, tokenizer
        sweeps = [(name, values) for name, values in asdict(settings.sweep).items() if values]
        self.changes: list[dict[str, float]] = [{}]
        if sweeps:
            (name, values), *_ = sweeps
            self.changes = [{name: value} for value in values]

    def run(self, phase: int) -> Evaluated:
        """Collect and score responses to all prompts for each value of the sweep. The result is the same on every
        rank."""
        evaluated = Evaluated()
        # Each value of the sweep has its own stream, which keeps its responses and scores apart.
        for stream, changes in enumerate(self.changes, EVALUATION):
            suffix = "".join(f"@{name}={value:g}" for name, value in changes.items())
            rollouts = self.collect(self.prompts, self.settings.n, stream=stream, phase=phase, **changes)
            scored = {
                name: scorer.score(self.prompts, rollouts, stream=stream, phase=phase)
                for name, scorer in self.scorers.items()
            }
            for name, scores in scored.items():
                evaluated.metrics |= _means(f"eval/{name}", scores, suffix)
            lengths = [len(rollout.response) for rollout in rollouts]
            evaluated.metrics[f"eval/response_tokens{suffix}"] = sum(lengths) / len(lengths)
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


def _means(name: str, scores: Scores, suffix: str) -> dict[str, float]:
    """Return the mean scores over the samples that have one, and the mean of each component of a combined function."""
    # Each component of a metric function is a metric itself; those of the reward are logged below its name.
    means = {
        f"{SCORE}/{part}" if name == SCORE else f"eval/{unique_metric_name(part)}": mean
        for part, mean in scores.means().items()
    }
    totals = scores.totals()
    if totals and (name == SCORE or not scores.parts):
        means[name] = sum(totals) / len(totals)
    return {key + suffix: mean for key, mean in means.items()}
