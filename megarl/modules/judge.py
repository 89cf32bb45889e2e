"""Rollouts in, scores out: one rank asks the function, every rank gets the answer, or the error."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarl.config.rl import RewardConfig
from megarl.data.prompts import Prompt
from megarl.errors import DataError
from megarl.modules.journal import Entry, Journal, identity
from megarl.parallel.grid import Grid
from megarl.rewards.answers import Score
from megarl.rewards.client import RESERVED, RewardWorker
from megarl.rewards.combine import Combined, combine
from megarl.rewards.functions import RewardFunction, Spec, resolve
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

_WEIGHTED = re.compile(
    r"^(?:(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*)?(?P<function>\S+)$", re.IGNORECASE
)
TAKEN = ("score", "response_tokens")  # names that evaluations log other things under


@dataclass
class Judgement:
    """Scores in the order of the rollouts; None where there is none in the end (counted in `dropped`)."""

    scores: list[Score | None] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    failed: int = 0
    retried: int = 0
    dropped: int = 0

    def totals(self) -> list[float]:
        """A number per sample that has a score; per-token rewards count as their sum."""
        return [total(score) for score in self.scores if score is not None]

    def means(self) -> dict[str, float]:
        """Of each part, over the samples that have it."""
        present = {part: [value for value in column if value is not None] for part, column in self.parts.items()}
        return {part: sum(values) / len(values) for part, values in present.items() if values}


def total(score: Score) -> float:
    return sum(score) if isinstance(score, list) else score


class Judge:
    """Asks one function. Only the first rank has the worker process; it starts with the first question."""

    def __init__(
        self,
        function: Spec | RewardFunction,
        settings: RewardConfig,
        tokenizer: Tokenizer,
        grid: Grid,
        *,
        key: str = "reward.fn",
        options: dict[str, Any] | None = None,
        journal: Journal | None = None,
    ) -> None:
        """`journal` remembers scores over the end of a process, for this function as it is now."""
        self.grid, self.tokenizer, self.journal, self.batch_size = grid, tokenizer, journal, settings.batch_size
        self.worker: RewardWorker | None = None
        chosen = read_function(function, key)
        name = getattr(chosen, "name", "combined").rpartition(":")[2].rpartition(".")[2]
        name = key.partition(".")[0] if name == "<lambda>" else name
        self.name = free_name(name) if key == "metric.fn" else name
        self.scorer: str = grid.by_first(lambda: fingerprint(chosen, options or {}))
        if journal is not None:
            journal.function = self.scorer
        if grid.rank == 0:
            self.worker = RewardWorker(
                chosen,
                tokenizer,
                timeout_s=settings.timeout,
                retries=settings.retries,
                on_error=settings.on_error,
                batch_size=settings.batch_size,
                options=options,
                devices=settings.devices,
                key=key,
            )

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], stream: int, phase: int) -> Judgement:
        """The same on every rank; `prompts[rollout.prompt_id]` is a rollout's prompt."""
        asking = iter(()) if self.worker is None else self._ask(self.worker, prompts, rollouts, stream, phase)
        judgement: Judgement | None = None
        while judgement is None:  # the others hear of every call, so that they wait for no more than one of them
            judgement = self.grid.by_first(lambda: next(asking))
        return judgement

    def forget(self, before: int) -> None:
        """Let go of what the journal holds of phases before that one."""
        if self.worker is not None and self.journal is not None:
            self.journal.forget(before)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()

    def _ask(
        self, worker: RewardWorker, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], stream: int, phase: int
    ) -> Iterator[Judgement | None]:
        """Ask about what the journal does not know, a call's worth at a time, so that each answer is kept at once.

        Yields None after each call, and in the end what came of all.
        """
        known = {} if self.journal is None else self.journal.read(stream, phase)
        names = [identity(rollout, prompts[rollout.prompt_id].metadata) for rollout in rollouts]
        found: dict[int, Entry] = {
            row: known[name]
            for row, (name, rollout) in enumerate(zip(names, rollouts, strict=True))
            if name in known and _fits(known[name], rollout)
        }
        unknown = [row for row in range(len(rollouts)) if row not in found]
        judgement = Judgement()
        size = self.batch_size or max(len(unknown), 1)
        for first in range(0, len(unknown), size):
            rows = unknown[first : first + size]
            asked = [rollouts[row] for row in rows]
            scores = worker.score(**self._question([prompts[rollout.prompt_id] for rollout in asked], asked))
            if self.journal is not None:
                self.journal.write(stream, phase, [names[row] for row in rows], scores.values, scores.parts)
            for index, row in enumerate(rows):
                found[row] = (scores.values[index], {name: column[index] for name, column in scores.parts.items()})
            judgement.failed += scores.failed
            judgement.retried += scores.retried
            yield None
        order = [found[row] for row in range(len(rollouts))]
        judgement.scores = [score for score, _ in order]
        terms = list(dict.fromkeys(term for _, parts in order for term in parts))
        judgement.parts = {term: [parts.get(term) for _, parts in order] for term in terms}
        judgement.dropped = sum(score is None for score in judgement.scores)
        yield judgement

    def _question(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Texts of samples and the other fields of their records. A sampled end of sequence is no text."""
        outputs = [self.tokenizer.decode(rollout.spoken) for rollout in rollouts]
        names = sorted({name for prompt in prompts for name in prompt.metadata})
        return {
            "samples": [prompt.text + output for prompt, output in zip(prompts, outputs, strict=True)],
            "prompts": [prompt.text for prompt in prompts],
            "outputs": outputs,
            "metadata": {name: [prompt.metadata.get(name) for prompt in prompts] for name in names},
            "lengths": [len(rollout.response) for rollout in rollouts],
        }


def check_fields(prompts: Sequence[Prompt], key: str) -> None:
    """Refuse prompts whose records have a field by the name of something else that functions are given."""
    for name in RESERVED:
        having = [prompt for prompt in prompts if name in prompt.metadata]
        if having:  # all have it once one record has; None is what the others were given
            first = next((prompt for prompt in having if prompt.metadata[name] is not None), having[0])
            raise DataError(
                f"{first.where}: {name!r} is a reserved argument of {key}: rename the field "
                f"(none may be called {', '.join(RESERVED)})",
                key=name,
                where=first.where,
            )


def _fits(entry: Entry, rollout: Rollout) -> bool:
    """Per-token rewards are as many as the response has tokens."""
    return not isinstance(entry[0], list) or len(entry[0]) == len(rollout.response)


def free_name(name: str) -> str:
    """Of a metric, beside what evaluations log anyway."""
    return f"{name}_metric" if name in TAKEN else name


def read_function(function: Spec | RewardFunction, key: str) -> Any:
    """A function by name or as a callable; `0.7*a:f + 0.3*b:g` is a weighted sum of several."""
    if not isinstance(function, str) or not re.search(r"\s\+\s|\*", function):
        return resolve(function, key)
    found = [_WEIGHTED.match(part.strip()) for part in re.split(r"\s\+\s", function)]
    if not all(found):
        return resolve(function, key)  # says what a name looks like
    terms = [term for term in found if term is not None]
    return combine([term["function"] for term in terms], [float(term["weight"] or 1.0) for term in terms], key=key)


def fingerprint(function: RewardFunction | Combined, options: dict[str, Any]) -> str:
    """Stands for a function, what its file says now, and what it is given: other scores may come of any other."""
    parts: list[object] = [sorted((name, repr(value)) for name, value in options.items())]
    if isinstance(function, Combined):
        parts += [function.weights, [fingerprint(one, {}) for one in function.functions]]
    else:
        parts += [function.identity, Path(function.file).read_bytes() if function.file else b""]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
