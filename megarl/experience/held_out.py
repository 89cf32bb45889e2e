"""An evaluation outside training: chunks of prompts are answered, scored and stored, then measured together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.config.sections.evaluation import EvalConfig
from megarl.data.prompts import Prompt
from megarl.experience.evaluation import ReadAnswers, changes_of, metrics_of, suffix_of
from megarl.experience.results import ChunkName, Results
from megarl.experience.scorers import Scorer
from megarl.logging import get_logger
from megarl.parallel.grid import Grid
from megarl.rewards.scores import Scores, joined
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

# respond(indices of prompts, stream, {setting: value}) -> rollouts, the same on every rank
Respond = Callable[[range, int, Mapping[str, float]], list[Rollout]]
log = get_logger(__name__)


@dataclass
class Measured:
    """All responses to the prompts with one value of the sweep.

    Attributes:
        changes: the value, by the name of the setting; empty without a sweep.
        rollouts: the responses, sorted by (prompt_id, sample_id).
        scored: their scores, by the name of the scorer.
        metrics: means and measures by logged name.
    """

    changes: dict[str, float]
    rollouts: list[Rollout] = field(default_factory=list)
    scored: dict[str, Scores] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class HeldOut:
    """Evaluates a model on prompts. Every rank calls this, and every rank gets the same result."""

    def __init__(
        self,
        respond: Respond,
        prompts: Sequence[Prompt],
        scorers: Mapping[str, Scorer],
        settings: EvalConfig,
        tokenizer: Tokenizer,
        grid: Grid,
        results: Results | None,
        *,
        chunk: int,
        drops: bool = False,
        read_answers: ReadAnswers | None = None,
    ) -> None:
        """
        Args:
            respond: generates the responses to some of the prompts.
            prompts: all prompts.
            scorers: by the name of the logged mean, `score` for the reward.
            settings: the section `eval`.
            tokenizer: decodes responses.
            grid: the processes of the evaluation.
            results: where results are stored, on rank 0.
            chunk: number of prompts in a chunk.
            drops: whether a response may have no score (`reward.on_error=drop`). Otherwise a chunk whose stored scores
                lack one is scored again.
            read_answers: the answers that responses vote on; None for no vote.
        """
        self.respond, self.prompts, self.scorers, self.settings = respond, prompts, scorers, settings
        self.tokenizer, self.grid, self.results, self.read_answers = tokenizer, grid, results, read_answers
        self.drops = drops
        self.chunks = [range(first, min(first + chunk, len(prompts))) for first in range(0, len(prompts), chunk)]

    def run(self) -> list[Measured]:
        """Return the responses, scores and measures for each value of the sweep."""
        return [self._measured(stream, changes) for stream, changes in enumerate(changes_of(self.settings), EVALUATION)]

    def close(self) -> None:
        """Stop the scorers."""
        for scorer in self.scorers.values():
            scorer.close()

    def _measured(self, stream: int, changes: dict[str, float]) -> Measured:
        found = Measured(changes)
        parts: dict[str, list[Scores]] = {name: [] for name in self.scorers}
        for index, chunk in enumerate(self.chunks):
            name = ChunkName(stream, index)
            rollouts = self._rollouts(name, chunk, changes)
            found.rollouts += rollouts
            for scorer in self.scorers:
                parts[scorer].append(self._scores(name, scorer, rollouts))
            where = suffix_of(changes).removeprefix("@")
            log.info("%d of %d prompts%s", chunk.stop, len(self.prompts), f"  {where}" if where else "")
        found.scored = {name: joined(scores) for name, scores in parts.items()}
        found.metrics = metrics_of(found.rollouts, found.scored, self.tokenizer, self.read_answers)
        return found

    def _rollouts(self, name: ChunkName, chunk: range, changes: dict[str, float]) -> list[Rollout]:
        """Return the stored responses of a chunk, or new ones, which are stored."""
        found: list[Rollout] | None = self._on_disk(lambda results: results.rollouts(name))
        if found is not None:
            return found
        rollouts = self.respond(chunk, name.stream, changes)
        self._on_disk(lambda results: results.keep_rollouts(name, rollouts))
        return rollouts

    def _scores(self, name: ChunkName, scorer: str, rollouts: list[Rollout]) -> Scores:
        """Return the stored scores of a chunk, or new ones, which are stored. Stored ones of an evaluation that dropped
        responses are used only by one that drops them, too."""
        by = self.scorers[scorer].fingerprint
        found: Scores | None = self._on_disk(lambda results: results.scores(name, scorer, by, len(rollouts)))
        if found is not None and (self.drops or not found.dropped):
            return found
        # The scorer's own journal has a file per chunk, too: a call that has ended is not repeated.
        scores = self.scorers[scorer].score(self.prompts, rollouts, stream=name.stream, phase=name.index)
        self._on_disk(lambda results: results.keep_scores(name, scorer, by, scores))
        return scores

    def _on_disk(self, use: Callable[[Results], Any]) -> Any:
        """Return on every rank what rank 0 reads or writes."""

        def on_rank0() -> Any:
            assert self.results is not None
            return use(self.results)

        return self.grid.run_on_rank0(on_rank0)

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
                        part: column[row] for scores in found.scored.values() for part, column in scores.parts.items()
                    },
                }
            )
        return records


def result_of(measured: Sequence[Measured], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the metrics of all settings by logged name, and the numbers of prompts and responses."""
    totals = [scores for one in measured for name, scores in one.scored.items() if name == "score"]
    return {
        "metrics": {name + suffix_of(one.changes): value for one in measured for name, value in one.metrics.items()},
        "prompts": len(prompts),
        "responses": sum(len(one.rollouts) for one in measured),
        "without_score": sum(scores.dropped for scores in totals),
    }


def deciding_settings(config: Any) -> dict[str, Any]:
    """Return the settings that the responses of an evaluation depend on, by key. Neither the layout nor how fast
    something is computed is among them."""
    rollout = asdict(config.rollout)
    for name in ("n", "engine", "dump", "replay"):
        del rollout[name]
    return {
        "seed": config.seed,
        "trainer.precision": config.trainer.precision,
        "eval.n": config.eval.n,
        "chunk": config.chunk,
        **{f"rollout.{name}": value for name, value in rollout.items()},
        **{f"eval.sweep.{name}": value for name, value in asdict(config.eval.sweep).items()},
    }
