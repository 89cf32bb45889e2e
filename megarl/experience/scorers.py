"""Scoring of rollouts: the `Scorer` protocol, the journal of a scorer that rank 0 runs, and the scorer that calls a
reward function in its own process."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megarl.config.sections.reward import RewardConfig
from megarl.data.prompts import Prompt
from megarl.errors import DataError
from megarl.experience.journal import Entry, Journal, identity
from megarl.functions.named import NamedFunction, Spec, resolve, weighted_names
from megarl.parallel.grid import Grid
from megarl.rewards.answers import Score
from megarl.rewards.client import RewardWorker
from megarl.rewards.combine import Combined, combine
from megarl.rewards.fields import RESERVED
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

RESERVED_METRICS = (
    "score",
    "score_se",
    "vote",
    "vote_se",
    "response_tokens",
)  # names that evaluations use for other metrics


class Scorer(Protocol):
    """Scores rollouts. Every rank calls a scorer, and every rank gets the same scores or the same error.

    Attributes:
        name: name under which evaluations log the mean score.
        fingerprint: identifier of the code and options that produce the scores; a resume compares it.
    """

    name: str
    fingerprint: str

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the scores of rollouts in their order. `prompts[rollout.prompt_id]` is a rollout's prompt."""

    def forget(self, before: int) -> None:
        """Discard the stored scores of phases before this one."""

    def close(self) -> None:
        """Release processes and memory until the next call."""


Answered = tuple[Sequence[int], Scores]
"""Indices of rollouts, and their scores."""


class JournalledScorer(ABC):
    """A scorer that works on rank 0, and whose scores are in a journal before anything is done with them.

    Subclasses score what the journal lacks. They set `fingerprint` with `_identify` before the first call.
    """

    name: str
    fingerprint: str

    def __init__(self, tokenizer: Tokenizer, grid: Grid, settings: RewardConfig, journal: Journal | None) -> None:
        """`journal` keeps scores across restarts, for the present fingerprint."""
        self.grid, self.tokenizer, self.journal = grid, tokenizer, journal
        calls = settings.call_settings
        self.batch_size = calls.batch_size
        self.drops = calls.on_error == "drop"  # otherwise samples without a score are scored again

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the scores of rollouts in their order. Scores that the journal has are reused."""
        scores: Scores = self._from_rank0(self._steps(prompts, rollouts, stream, phase))
        return scores

    def forget(self, before: int) -> None:
        """Delete the journal of phases before this one."""
        if self.grid.rank == 0 and self.journal is not None:
            self.journal.forget(before)

    @abstractmethod
    def close(self) -> None:
        """Release processes and connections until the next call."""

    @abstractmethod
    def _score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Iterator[Answered | None]:
        """Score rollouts on rank 0. `prompts` has the prompt of each.

        Yields scores as soon as they are known; None to tell the other ranks that it still waits.
        """

    def _identify(self, fingerprint: str) -> None:
        """Set the fingerprint of the scores."""
        self.fingerprint = fingerprint
        if self.journal is not None:
            self.journal.function = fingerprint

    def _from_rank0(self, steps: Iterator[Any]) -> Any:
        """Return, on every rank, the first item that rank 0's iterator yields and that is not None. There is a
        broadcast per item, so that no rank waits longer than one step takes."""
        found = None
        while found is None:
            found = self.grid.run_on_rank0(lambda: next(steps))
        return found

    def _steps(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], stream: int, phase: int
    ) -> Iterator[Scores | None]:
        """Score the rollouts that the journal lacks, and store scores as soon as they are known.

        Yields None after each step, and all scores at the end.
        """
        known = {} if self.journal is None else self.journal.read(stream, phase)
        names = [identity(rollout, prompts[rollout.prompt_id].metadata) for rollout in rollouts]
        found: dict[int, Entry] = {
            row: known[name]
            for row, (name, rollout) in enumerate(zip(names, rollouts, strict=True))
            if name in known and _fits(known[name], rollout) and (self.drops or known[name][0] is not None)
        }
        unknown = [row for row in range(len(rollouts)) if row not in found]
        failed = repeated = 0
        asked = [rollouts[row] for row in unknown]
        for answered in self._score([prompts[rollout.prompt_id] for rollout in asked], asked) if asked else ():
            if answered is not None:
                indices, scores = answered
                rows = [unknown[index] for index in indices]
                if self.journal is not None:
                    self.journal.write(stream, phase, [names[row] for row in rows], scores.values, scores.parts)
                for index, row in enumerate(rows):
                    found[row] = (scores.values[index], {name: column[index] for name, column in scores.parts.items()})
                failed += scores.failed_calls
                repeated += scores.repeated_calls
            yield None
        entries = [found[row] for row in range(len(rollouts))]
        components = list(dict.fromkeys(part for _, parts in entries for part in parts))
        yield Scores(
            values=[score for score, _ in entries],
            parts={part: [parts.get(part) for _, parts in entries] for part in components},
            failed_calls=failed,
            repeated_calls=repeated,
        )


class FunctionScorer(JournalledScorer):
    """Scores rollouts with a function. Rank 0 owns the function's process, which starts at the first call."""

    def __init__(
        self,
        function: Spec | NamedFunction,
        settings: RewardConfig,
        tokenizer: Tokenizer,
        grid: Grid,
        *,
        key: str = "reward.fn",
        options: dict[str, Any] | None = None,
        journal: Journal | None = None,
    ) -> None:
        """Resolve and check the function. `journal` keeps its scores across restarts, for the present code and
        options."""
        super().__init__(tokenizer, grid, settings, journal)
        self.worker: RewardWorker | None = None
        resolved = read_function(function, key)
        name = getattr(resolved, "name", "combined").rpartition(":")[2].rpartition(".")[2]
        name = key.partition(".")[0] if name == "<lambda>" else name
        self.name = unique_metric_name(name) if key == "metric.fn" else name
        self._identify(grid.run_on_rank0(lambda: fingerprint(resolved, options or {})))
        calls = settings.call_settings
        if grid.rank == 0:
            self.worker = RewardWorker(
                resolved,
                tokenizer,
                timeout_s=calls.timeout,
                retries=calls.retries,
                on_error=calls.on_error,
                options=options,
                devices=calls.devices,
                key=key,
            )

    def close(self) -> None:
        """Stop the function's process; the next call starts it again."""
        if self.worker is not None:
            self.worker.close()

    def _score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Iterator[Answered]:
        """Call the function, with `reward.calls.batch_size` rollouts per call."""
        assert self.worker is not None
        size = self.batch_size or len(rollouts)
        for first in range(0, len(rollouts), size):
            batch = slice(first, first + size)
            scores = self.worker.score(**self._question(prompts[batch], rollouts[batch]))
            yield range(len(rollouts))[batch], scores

    def _question(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Return the function's arguments: texts, other fields of the prompt records, lengths, and where the records
        are. A sampled EOS is left out."""
        outputs = [self.tokenizer.decode(rollout.response_without_eos) for rollout in rollouts]
        names = sorted({name for prompt in prompts for name in prompt.metadata})
        return {
            "samples": [prompt.text + output for prompt, output in zip(prompts, outputs, strict=True)],
            "prompts": [prompt.text for prompt in prompts],
            "outputs": outputs,
            "metadata": {name: [prompt.metadata.get(name) for prompt in prompts] for name in names},
            "lengths": [len(rollout.response) for rollout in rollouts],
            "places": [prompt.where for prompt in prompts],
        }


def keep_scored(
    rollouts: Sequence[Rollout], scores: Scores, greedy: Mapping[int, Score | None] | None = None
) -> tuple[list[Rollout], list[Score], list[Score] | None]:
    """Return the rollouts that have a score, their scores, and the baselines of their prompts.

    Args:
        rollouts: the rollouts of a phase.
        scores: their scores, in the same order.
        greedy: scores of the greedy responses by prompt_id, as baselines. Rollouts of a prompt without one are dropped.
    """
    kept: list[Rollout] = []
    values: list[Score] = []
    baselines: list[Score] = []
    for rollout, score in zip(rollouts, scores.values, strict=True):
        baseline = 0.0 if greedy is None else greedy[rollout.prompt_id]
        if score is not None and baseline is not None:
            kept.append(rollout)
            values.append(score)
            baselines.append(baseline)
    return kept, values, None if greedy is None else baselines


def check_fields(prompts: Sequence[Prompt], key: str) -> None:
    """Refuse prompts whose records have a field with the name of a reserved argument of scoring functions."""
    for name in RESERVED:
        clashing = [prompt for prompt in prompts if name in prompt.metadata]
        if clashing:  # a field of one record is in the metadata of all, as None where a record lacks it
            first = next((prompt for prompt in clashing if prompt.metadata[name] is not None), clashing[0])
            raise DataError(
                f"{first.where}: {name!r} is a reserved argument of {key}: rename the field "
                f"(none may be called {', '.join(RESERVED)})",
                key=name,
                where=first.where,
            )


def _fits(entry: Entry, rollout: Rollout) -> bool:
    """Return whether per-token rewards are as many as the response has tokens."""
    return not isinstance(entry[0], list) or len(entry[0]) == len(rollout.response)


def unique_metric_name(name: str) -> str:
    """Return a name for a metric that does not clash with the names that evaluations log themselves."""
    return f"{name}_metric" if name in RESERVED_METRICS else name


def read_function(function: Spec | NamedFunction, key: str) -> Any:
    """Resolve a function given by name or as a callable. `0.7*a:f + 0.3*b:g` is a weighted sum of several functions."""
    terms = weighted_names(function) if isinstance(function, str) else None
    if terms is None:
        return resolve(function, key)
    return combine([name for _, name in terms], [weight for weight, _ in terms], key=key)


def fingerprint(function: NamedFunction | Combined, options: dict[str, Any]) -> str:
    """Return a hash of a function, its source file and its options. Scores are reused only if it is equal."""
    parts: list[object] = [sorted((name, repr(value)) for name, value in options.items())]
    if isinstance(function, Combined):
        parts += [function.weights, [fingerprint(one, {}) for one in function.functions]]
    else:
        parts += [function.identity, Path(function.file).read_bytes() if function.file else b""]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
