"""Evaluation by generation: responses to held-out prompts, their scores and metrics, over the values of a setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.config.rl import EvalConfig
from megarl.data.prompts import Prompt
from megarl.modules.judge import Judge, Judgement, free_name, total
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

# respond(prompts, n, stream=, phase=, **{setting: value}) -> rollouts
Respond = Callable[..., list[Rollout]]


SCORE = "eval/score"


@dataclass
class Evaluated:
    """`metrics` by the names they are logged under; `samples` as rows of a table."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Evaluation:
    """Answers, judges, and keeps a few responses to be shown."""

    def __init__(
        self,
        respond: Respond,
        prompts: Sequence[Prompt],
        judges: dict[str, Judge],
        settings: EvalConfig,
        tokenizer: Tokenizer,
    ) -> None:
        """`judges` by the name their mean is logged under, `score` for the reward."""
        self.respond, self.prompts, self.judges = respond, prompts, judges
        self.settings, self.tokenizer = settings, tokenizer
        sweeps = [(name, values) for name, values in asdict(settings.sweep).items() if values]
        self.changes: list[dict[str, float]] = [{}]
        if sweeps:
            (name, values), *_ = sweeps
            self.changes = [{name: value} for value in values]

    def run(self, phase: int) -> Evaluated:
        """Answer every prompt under every value of the sweep. The same on every rank."""
        evaluated = Evaluated()
        # Each value of the sweep is a stream of its own, as its responses are kept and scored apart from the others'.
        for stream, changes in enumerate(self.changes, EVALUATION):
            suffix = "".join(f"@{name}={value:g}" for name, value in changes.items())
            rollouts = self.respond(self.prompts, self.settings.n, stream=stream, phase=phase, **changes)
            judged = {name: judge.score(self.prompts, rollouts, stream, phase) for name, judge in self.judges.items()}
            for name, judgement in judged.items():
                evaluated.metrics |= _means(f"eval/{name}", judgement, suffix)
            lengths = [len(rollout.response) for rollout in rollouts]
            evaluated.metrics[f"eval/response_tokens{suffix}"] = sum(lengths) / len(lengths)
            evaluated.samples += self._rows(rollouts, judged, suffix.removeprefix("@"))
        return evaluated

    def close(self) -> None:
        for judge in self.judges.values():
            judge.close()

    def _rows(self, rollouts: Sequence[Rollout], judged: dict[str, Judgement], setting: str) -> list[dict[str, Any]]:
        rows = []
        for row, rollout in enumerate(rollouts[: self.settings.table]):
            found = {name: judgement.scores[row] for name, judgement in judged.items()}
            rows.append(
                {
                    **({"setting": setting} if setting else {}),
                    "prompt": self.prompts[rollout.prompt_id].text,
                    "response": self.tokenizer.decode(rollout.spoken),
                    **{name: None if score is None else total(score) for name, score in found.items()},
                }
            )
        return rows


def _means(name: str, judgement: Judgement, suffix: str) -> dict[str, float]:
    """Means over the samples that have a score; of several functions, each one's own too."""
    # The parts of a metric are metrics of their own, those of a score belong to it.
    means = {
        f"{SCORE}/{part}" if name == SCORE else f"eval/{free_name(part)}": mean
        for part, mean in judgement.means().items()
    }
    totals = judgement.totals()
    if totals and (name == SCORE or not judgement.parts):
        means[name] = sum(totals) / len(totals)
    return {key + suffix: mean for key, mean in means.items()}
