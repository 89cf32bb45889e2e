"""An evaluation outside training: chunks of prompts are answered, scored and stored, then measured together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megarl.config.sections.evaluation import EvalConfig
from megarl.data.prompts import Prompt
from megarl.experience.evaluation import Measured, ReadAnswers, Sweep, suffix_of
from megarl.experience.results import ChunkName, Results
from megarl.experience.scorers import Scorer
from megarl.logging import get_logger
from megarl.parallel.grid import Grid
from megarl.progress import waiting
from megarl.rewards.scores import Scores
from megarl.rollout.noise import EVALUATION
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

# respond(indices of prompts, stream, {setting: value}) -> rollouts, the same on every rank
Respond = Callable[[range, int, Mapping[str, float]], list[Rollout]]
log = get_logger(__name__)


class HeldOut(Sweep):
    """Evaluates a model on prompts, chunk by chunk."""

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
            drops: whether a response may have no score (`reward.calls.on_error=drop`). Otherwise a chunk whose stored
                scores lack one is scored again.
            read_answers: the answers that responses vote on; None for no vote.
        """
        super().__init__(prompts, scorers, settings, tokenizer, read_answers)
        self.respond, self.grid, self.results, self.drops = respond, grid, results, drops
        self.chunks = [range(first, min(first + chunk, len(prompts))) for first in range(0, len(prompts), chunk)]

    def run(self) -> list[Measured]:
        """Return the responses, scores and measures for each value of the sweep."""
        with waiting("evaluating", len(self.changes) * len(self.chunks), after_s=0) as chunk_done:
            return [
                self._measured(stream, changes, self._numbers(changes, chunk_done))
                for stream, changes in enumerate(self.changes, EVALUATION)
            ]

    def close(self) -> None:
        """Stop the scorers."""
        for scorer in self.scorers.values():
            scorer.close()

    def _numbers(self, changes: dict[str, float], chunk_done: Callable[[], None]) -> Iterator[int]:
        """Yield the index of each chunk; after each, report it as done and log how many prompts are."""
        where = suffix_of(changes).removeprefix("@")
        for index, chunk in enumerate(self.chunks):
            yield index
            chunk_done()
            log.info("%d of %d prompts%s", chunk.stop, len(self.prompts), f"  {where}" if where else "")

    def _rollouts(self, stream: int, number: int, changes: dict[str, float]) -> list[Rollout]:
        """Return the stored responses of a chunk, or new ones, which are stored."""
        name = ChunkName(stream, number)
        found: list[Rollout] | None = self._on_disk(lambda results: results.rollouts(name))
        if found is not None:
            return found
        rollouts = self.respond(self.chunks[number], stream, changes)
        self._on_disk(lambda results: results.keep_rollouts(name, rollouts))
        return rollouts

    def _scores(self, stream: int, number: int, scorer: str, rollouts: list[Rollout]) -> Scores:
        """Return the stored scores of a chunk, or new ones, which are stored. Stored ones of an evaluation that dropped
        responses are used only by one that drops them, too."""
        name, by = ChunkName(stream, number), self.scorers[scorer].fingerprint
        found: Scores | None = self._on_disk(lambda results: results.scores(name, scorer, by, len(rollouts)))
        if found is not None and (self.drops or not found.dropped):
            return found
        # The scorer's own journal has a file per chunk, too: a call that has ended is not repeated.
        scores = super()._scores(stream, number, scorer, rollouts)
        self._on_disk(lambda results: results.keep_scores(name, scorer, by, scores))
        return scores

    def _on_disk(self, use: Callable[[Results], Any]) -> Any:
        """Return on every rank what rank 0 reads or writes."""

        def on_rank0() -> Any:
            assert self.results is not None
            return use(self.results)

        return self.grid.run_on_rank0(on_rank0)


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
    return {
        "seed": config.seed,
        "trainer.precision": config.trainer.precision,
        "eval.n": config.eval.n,
        "chunk": config.chunk,
        **{f"rollout.{name}": value for name, value in _sampling(config).items()},
        **{f"eval.sweep.{name}": value for name, value in asdict(config.eval.sweep).items()},
    }


def stored_settings(config: Any) -> dict[str, Any]:
    """Return the sections that the result holds, without the keys that decide only where and how fast something is
    computed."""
    calls = asdict(config.reward.call_settings)
    del calls["devices"]
    return {
        "data": asdict(config.data),
        "rollout": _sampling(config),
        "reward": {**asdict(config.reward), "calls": calls},
        "metric": asdict(config.metric),
        "eval": asdict(config.eval),
    }


def _sampling(config: Any) -> dict[str, Any]:
    """Return the keys of the section `rollout` that responses depend on."""
    sampling = asdict(config.rollout)
    del sampling["engine"]
    return sampling
