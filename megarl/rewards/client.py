"""The run's side of scoring: it calls the worker process, repeats failed calls and counts them.

A sample without a score is an error or a counted drop, never a 0.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megarl.config.offers import either
from megarl.config.sections.reward import SCORER_START_S
from megarl.errors import ConfigError, DataError, RewardError
from megarl.functions.named import NamedFunction, Spec, resolve
from megarl.logging import get_logger
from megarl.rewards.fields import RESERVED
from megarl.rewards.process import CallFailedError, WorkerProcess
from megarl.rewards.scores import Scores

_log = get_logger(__name__)

ON_ERROR = ("error", "drop")


class ScoringError(RewardError):
    """A call of a reward function that failed.

    Attributes:
        kind: what went wrong: raised, count (number of scores), score (of a sample), late or died.
    """

    def __init__(self, message: str, *, kind: str, **data: Any) -> None:
        super().__init__(message, **data)
        self.kind = kind


REMEDIES = {
    "raised": "correct the function",
    "count": "let it return one score for every sample",
    "score": "let it return a finite number for every sample",
    "late": "give it more time (reward.calls.timeout) or fewer samples per call (reward.calls.batch_size)",
    "died": "look at what it printed, or give it fewer samples per call (reward.calls.batch_size) where memory ran out",
}


@dataclass(frozen=True)
class _Failure:
    """The failure of a call: its kind, a description, the samples that it leaves without a score, and where it
    happened."""

    kind: str
    what: str
    samples: str
    where: str | None

    @property
    def reason(self) -> str:
        return f"{self.what} ({self.samples})" if self.samples else self.what


@dataclass(frozen=True)
class _Question:
    """The arguments of `score`: texts, fields of the records, lengths of the responses, where the records are."""

    texts: Mapping[str, Sequence[str]]
    metadata: Mapping[str, Sequence[Any]]
    lengths: Sequence[int] | None
    places: Sequence[str] | None

    def about(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the arguments for some of the samples."""
        return {
            "texts": {name: [column[row] for row in rows] for name, column in self.texts.items()},
            "metadata": {name: [column[row] for row in rows] for name, column in self.metadata.items()},
            "lengths": None if self.lengths is None else [self.lengths[row] for row in rows],
        }


class RewardWorker:
    """A reward function in a separate process, which is started at the first call and again after a failure.

    Use it from one rank and one thread. The function is called as `fn(samples=..., prompts=..., outputs=...,
    tokenizer=..., **metadata)`.
    """

    def __init__(
        self,
        function: Spec | NamedFunction,
        tokenizer: object,
        *,
        timeout_s: float = 60.0,
        retries: int = 1,
        on_error: str = "error",
        options: Mapping[str, Any] | None = None,
        devices: str | None = "",
        start_timeout_s: float = SCORER_START_S,
        key: str = "reward.fn",
    ) -> None:
        """Check the function and pickle it. The process is not started yet.

        Args:
            function: "package.module:function", "path/to/file.py:function", a callable, or what `combine` returns.
            tokenizer: an object that can be pickled, or (kind, path) for `build_tokenizer` in the worker.
            timeout_s: maximum seconds of a call.
            retries: how often a failed call is repeated.
            on_error: what happens to samples that still have no score: "error" raises, "drop" leaves them out.
            options: keyword arguments of the function, which override fields of the records.
            devices: CUDA_VISIBLE_DEVICES of the worker; "" hides every GPU, None shows what the run sees.
            start_timeout_s: maximum seconds in which the worker loads the function and the tokenizer.
            key: configuration key of the function, for messages.
        """
        self._key = key
        for name, good, value, wants in (
            (
                "reward.calls.timeout",
                timeout_s > 0 and math.isfinite(timeout_s),
                timeout_s,
                "a number of seconds above 0",
            ),
            ("reward.calls.retries", retries >= 0, retries, "0 or more"),
        ):
            if not good:
                raise ConfigError(f"{name}={value} is not valid: use {wants}", key=name, value=value)
        if on_error not in ON_ERROR:
            raise ConfigError(
                f"reward.calls.on_error={on_error} is not valid: use {either(ON_ERROR)}",
                key="reward.calls.on_error",
                value=on_error,
                offers={"reward.calls.on_error": ON_ERROR},
            )
        self._function = resolve(function, key)
        self._setup = _pack_setup(self._function, tokenizer, dict(options or {}), timeout_s, key)
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._retries, self._on_error = retries, on_error
        self._devices = devices
        self._process: WorkerProcess | None = None
        self._warned: set[tuple[str, str, bool]] = set()

    @property
    def name(self) -> str:
        """Name of the function, for messages."""
        return self._function.name

    def start(self) -> None:
        """Start the worker and load the function, unless it is running.

        Raises:
            RewardError: the worker cannot load the function or the tokenizer. Repeating would not help.
        """
        self._running()

    def score(
        self,
        samples: Sequence[str],
        prompts: Sequence[str],
        outputs: Sequence[str],
        metadata: Mapping[str, Sequence[Any]] | None = None,
        lengths: Sequence[int] | None = None,
        places: Sequence[str] | None = None,
    ) -> Scores:
        """Score samples in one call. Repeated calls have only the samples without a score.

        Args:
            samples: prompt and response of each sample as one text.
            prompts: prompt of each sample.
            outputs: response of each sample.
            metadata: the other fields of the prompt records, each with a value for every sample.
            lengths: tokens of each response, which a list of per-token rewards must match.
            places: `file:line` of each prompt record, for messages.

        Raises:
            RewardError: with on_error="error", samples without a usable score after the last call.
        """
        question = _Question(
            {"samples": samples, "prompts": prompts, "outputs": outputs}, dict(metadata or {}), lengths, places
        )
        self._check(question)
        scores = Scores(values=[None] * len(samples))
        if samples:
            self._ask_until_scored(question, range(len(samples)), scores)
        return scores

    def close(self) -> None:
        """Stop the worker. A later call starts it again."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> RewardWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, question: _Question) -> None:
        count = len(question.texts["samples"])
        taken = [name for name in question.metadata if name in RESERVED]
        if taken:
            raise DataError(
                f"a field of the prompt records is called {taken[0]!r}, which is a reserved argument of {self._key}; "
                f"rename it (none may be called {', '.join(RESERVED)})",
                key=taken[0],
            )
        columns: dict[str, Sequence[Any]] = {**question.metadata, **question.texts}
        if question.lengths is not None:
            columns["lengths"] = question.lengths
        if question.places is not None:
            columns["places"] = question.places
        for name, column in columns.items():
            if len(column) != count:
                raise DataError(f"{name} has {len(column)} entries for {count} samples; pass one for each", key=name)

    def _ask_until_scored(self, question: _Question, rows: Sequence[int], scores: Scores) -> None:
        """Call until every sample has a score or the retries are used up. Repeated calls have only the remaining
        samples."""
        failure: _Failure | None = None
        for attempt in range(self._retries + 1):
            scores.repeated_calls += attempt > 0
            rows, latest = self._attempt(question, rows, scores)
            if failure is not None and latest != failure:  # a failure that repeats is logged once, at the end
                self._warn(failure, dropped=False, follows="and is called again")
            failure = latest
            if failure is None:
                return
            scores.failed_calls += 1
        assert failure is not None
        if self._on_error == "error":
            tries = f" in {self._retries + 1} tries" if self._retries else ""
            raise ScoringError(
                f"{self._key}={self.name} {failure.reason}{tries}; {self._remedy(failure.kind)}, or leave such "
                "samples out with reward.calls.on_error=drop",
                kind=failure.kind,
                key=self._key,
                value=self.name,
                where=failure.where,
                offers={"reward.calls.on_error": ["drop"]},
            )
        follows = f"and {len(rows)} samples are dropped (reward.calls.on_error=drop): {self._remedy(failure.kind)}"
        self._warn(failure, dropped=True, follows=follows)

    @property
    def _ready_made(self) -> bool:
        """Whether the function is one of megarl.rewards, which a user does not correct."""
        return str(self._function.source).startswith("megarl.rewards.")

    def _remedy(self, kind: str) -> str:
        """Return what to do about a failure of a kind."""
        if kind != "raised" or not self._ready_made:
            return REMEDIES[kind]
        if self._key == "metric.fn":  # it has no options
            return "correct the records"
        return f"correct {self._key.removesuffix('fn')}options or the records"

    def _warn(self, failure: _Failure, *, dropped: bool, follows: str) -> None:
        """Log a warning the first time that samples are scored again, or dropped, for this reason; logged metrics count
        the others."""
        reason = (failure.kind, failure.what, dropped)
        level = logging.DEBUG if reason in self._warned else logging.WARNING
        self._warned.add(reason)
        _log.log(level, "%s=%s %s, %s", self._key, self.name, failure.reason, follows)

    def _attempt(
        self, question: _Question, rows: Sequence[int], scores: Scores
    ) -> tuple[Sequence[int], _Failure | None]:
        """Call once. Return the samples still without a score, and the failure of the first of them."""
        fields = ", ".join(question.metadata)
        payload = _pack(question.about(rows), f"a field of the prompt records ({fields})", key=fields)
        process = self._running()
        try:
            answer = process.request(payload, self._timeout_s)
        except CallFailedError as error:
            return rows, self._call_failure(error, rows, question.places)
        flaws: dict[int, str] = {}
        for row, value in zip(rows, answer["values"], strict=True):
            if isinstance(value, dict):
                flaws[row] = value["why"]
            else:
                scores.values[row] = value
        for name, part in answer["parts"].items():
            column = scores.parts.setdefault(name, [None] * len(scores.values))
            for row, value in zip(rows, part, strict=True):
                column[row] = value
        if not flaws:
            return [], None
        first, why = next(iter(flaws.items()))
        place = question.places[first] if question.places is not None else ""
        more = f"and {len(flaws) - 1} more" if len(flaws) > 1 else ""
        where = f"sample {first}"
        others = ", ".join(filter(None, (place, more)))  # not in the description, by which warnings are told apart
        return list(flaws), _Failure("score", f"gave no usable score: {where} {why}", others, where)

    def _call_failure(self, error: CallFailedError, rows: Sequence[int], places: Sequence[str] | None) -> _Failure:
        """Return the failure of a call with these samples. Ready-made functions name a bad record by its position in
        the call; here it gets its place in the data."""
        samples = _span(rows)
        named = re.search(r" of sample (\d+) ", str(error)) if self._ready_made else None
        if places is not None and named is not None and int(named[1]) < len(rows):
            place = places[rows[int(named[1])]]
            samples += f"; sample {named[1]} of the call is {place}" if place else ""
        return _Failure(error.kind, str(error), samples, error.where)

    def _running(self) -> WorkerProcess:
        """Return a running worker that has loaded the function."""
        if self._process is not None and self._process.alive:
            return self._process
        if self._process is not None:
            self._process.kill()  # it is dead, but processes that it started may be alive
            self._process = None
        process = WorkerProcess(self.name, self._devices)
        try:
            process.request(self._setup, self._start_timeout_s)
        except CallFailedError as error:
            raise ScoringError(
                f"{self._key}={self.name} could not be loaded: it {error}; correct {self._key} or what it imports",
                kind=error.kind,
                key=self._key,
                value=self.name,
                where=error.where,
            ) from error
        else:
            self._process = process
        finally:
            if self._process is None:
                process.kill()
        return process


def _pack_setup(
    function: NamedFunction, tokenizer: object, options: Mapping[str, Any], timeout_s: float, key: str
) -> bytes:
    """Return the first frame: the import path, then the function, the tokenizer and the options."""
    here = str(Path.cwd())
    path = [entry or here for entry in sys.path]
    packed = _pack((function, tokenizer, options), f"the tokenizer or an option of {key}", key)
    path = path if here in path else [*path, here]
    return pickle.dumps({"path": path, "timeout_s": timeout_s, "packed": packed})


def _pack(content: object, what: str, key: str) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(content)  # type: ignore[no-any-return]
    except Exception as error:  # pickling an object may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{what} cannot be sent to the worker process ({type(error).__name__}: {reason}); "
            "use plain values, and for a tokenizer its (kind, path)",
            key=key,
        ) from error


def _span(rows: Sequence[int]) -> str:
    return f"sample {rows[0]}" if len(rows) == 1 else f"{len(rows)} samples, {rows[0]} to {rows[-1]}"
