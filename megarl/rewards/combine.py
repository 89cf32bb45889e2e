"""Several reward functions combined into a weighted sum. Each function's own scores are kept for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarl.config.reward_terms import numbered
from megarl.errors import ConfigError
from megarl.functions.named import Function, NamedFunction, Spec, resolve
from megarl.rewards.answers import AnswerError, NoScore, Score, read_scores
from megarl.rewards.scores import weighted_sum


@dataclass
class Combined:
    """A weighted sum of reward functions, callable like one; made by `combine`.

    Attributes:
        functions: the functions.
        weights: weight of each function.
        options: keyword arguments of each function, which override the fields of the records.
        names: a short, unique name of each function.
    """

    functions: tuple[NamedFunction, ...]
    weights: tuple[float, ...]
    options: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    _loaded: list[Function] = field(default_factory=list, repr=False)

    def load(self) -> None:
        """Load every function, so that one that cannot be loaded is found before the first call."""
        if not self._loaded:
            self._loaded = [function.load() for function in self.functions]

    def __call__(self, samples: Sequence[str], **columns: Any) -> list[Score | NoScore]:
        """Return the weighted sum for each sample."""
        return self.evaluate(samples=samples, **columns)[0]

    def evaluate(
        self, samples: Sequence[str], **columns: Any
    ) -> tuple[list[Score | NoScore], dict[str, list[float | None]]]:
        """Return the weighted sum for each sample, and each function's own scores without its weight.

        A sample without a score from any one function has none. In the second result, lists of per-token rewards count
        as their sum.
        """
        self.load()
        answers: list[list[Score | NoScore]] = []
        parts: dict[str, list[float | None]] = {}
        for function, name, options in zip(self._loaded, self.names, self.options, strict=True):
            scores, own_parts = self._call(function, name, options, samples, columns)
            answers.append(scores)
            parts[name] = [number_of(score) for score in scores]
            parts |= {f"{name}/{part}": column for part, column in own_parts.items()}
        return [self._sum(scores) for scores in zip(*answers, strict=True)], parts

    def _call(
        self,
        function: Function,
        name: str,
        options: Mapping[str, Any],
        samples: Sequence[str],
        columns: Mapping[str, Any],
    ) -> tuple[list[Score | NoScore], dict[str, list[float | None]]]:
        """Return a function's scores, and what it returned beside them if it returned several by name."""
        answer = function(samples=samples, **{**columns, **options})
        named = dict(answer) if isinstance(answer, Mapping) else {"": answer}
        try:
            read = [read_scores(column, len(samples)) for column in [*named.values()] or [None]]
        except AnswerError as error:
            raise AnswerError(f"{error} (the part {name})") from error
        parts = {str(part): [number_of(s) for s in own] for part, own in zip([*named][1:], read[1:], strict=True)}
        return [NoScore(f"{s.why} (from {name})") if isinstance(s, NoScore) else s for s in read[0]], parts

    def _sum(self, scores: Sequence[Score | NoScore]) -> Score | NoScore:
        """Add weighted scores. Per-token lists add up token by token; a plain score is added at the last token, as in
        training."""
        given: list[Score] = []
        for score in scores:
            if isinstance(score, NoScore):
                return score
            given.append(score)
        lengths = list(dict.fromkeys(len(score) for score in given if isinstance(score, list)))
        if len(lengths) > 1:
            return NoScore(f"got lists of {lengths[0]} and {lengths[1]} per-token rewards, which do not add up")
        return weighted_sum(given, self.weights)


def combine(
    functions: Sequence[Spec],
    weights: Sequence[float] | None = None,
    options: Sequence[Mapping[str, Any]] | None = None,
    key: str = "reward.fn",
) -> Combined:
    """Return one reward function that computes the weighted sum of several.

    Args:
        functions: names or callables, as `RewardWorker` takes them.
        weights: a weight for each function; None weighs all by 1.
        options: keyword arguments for each function; None for none.
        key: configuration key that they come from, for messages.
    """
    if not functions:
        raise ConfigError(f"{key} is an empty list: name at least one function", key=key, value=[])
    weights = [1.0] * len(functions) if weights is None else weights
    options = [{}] * len(functions) if options is None else options
    for what, given in (("weights", weights), ("options", options)):
        if len(given) != len(functions):
            raise ConfigError(
                f"{key} names {len(functions)} functions but has {len(given)} {what}: set one for each",
                key=what,
                value=given,
            )
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"{key}: a weight is {weight}; use a finite number", key="weight", value=weight)
    resolved = tuple(resolve(function, key) for function in functions)
    return Combined(
        functions=resolved,
        weights=tuple(float(weight) for weight in weights),
        options=tuple(dict(own) for own in options),
        names=_short_names(resolved),
    )


def _short_names(functions: Sequence[NamedFunction]) -> tuple[str, ...]:
    """Return each function's own name, numbered from its second use on."""
    names: list[str] = []
    for function in functions:
        names.append(numbered(function.name.rpartition(":")[2], names))
    return tuple(names)


def number_of(score: Score | NoScore) -> float | None:
    """Return a score as one number: per-token rewards count as their sum. None if there is no score."""
    if isinstance(score, NoScore):
        return None
    return sum(score) if isinstance(score, list) else score
