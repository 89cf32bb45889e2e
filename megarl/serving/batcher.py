"""Joins the texts of concurrent requests into batches, and gives every request the scores of its own texts.

threads that read requests          the thread that runs the model
submit(a0 a1 a2) ----.
submit(b0)       ----+--> queue --> take() = [a0 a1], put() ... take() = [a2 b0], put()
submit(c0 c1)    ----'
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from megarl.rewards.reader import ReadTokens

Text = ReadTokens
DRAIN_S = 5.0
"""Seconds in which a closed batcher still scores the texts that wait."""


class ClosedError(Exception):
    """The server is stopping and takes no more texts."""


class NoScoreError(Exception):
    """The model gave a text a score that is not a finite number."""


@dataclass(eq=False)
class _Request:
    """The texts of one request, and their scores as far as they are known."""

    texts: Sequence[Text]
    arrived: float
    answer: Future[list[float]] = field(default_factory=Future)
    scores: list[float] = field(default_factory=list)
    taken: int = 0

    def finish(self, outcome: list[float] | Exception) -> None:
        """Answer the request, unless it was cancelled."""
        try:
            if isinstance(outcome, Exception):
                self.answer.set_exception(outcome)
            else:
                self.answer.set_result(outcome)
        except InvalidStateError:  # its client has gone
            return


@dataclass(frozen=True)
class Batch:
    """Texts that are scored together. `shares` holds the requests that they belong to, in order, with the number of
    texts of each."""

    texts: list[Text]
    shares: list[tuple[_Request, int]]


class Batcher:
    """A queue of texts between the threads that read requests and the one thread that runs the model."""

    def __init__(self, batch_size: int, max_wait: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            batch_size: maximum number of texts in a batch.
            max_wait: seconds that a text waits for others before a smaller batch is taken.
            clock: reads the time; tests replace it.
        """
        self.batch_size, self.max_wait, self._clock = batch_size, max_wait, clock
        self._requests: deque[_Request] = deque()
        # Reentrant: a signal handler calls `close` in the thread that may be inside `take`.
        self._changed = threading.Condition(threading.RLock())
        self._closed_at: float | None = None

    @property
    def waiting(self) -> int:
        """Number of texts that are in no batch yet."""
        with self._changed:
            return sum(len(request.texts) - request.taken for request in self._requests)

    @property
    def closed(self) -> bool:
        """Whether no more texts are taken."""
        return self._closed_at is not None

    def submit(self, texts: Sequence[Text]) -> Future[list[float]]:
        """Put the texts of a request into the queue. Cancelling the result takes them out again.

        Raises:
            ClosedError: the batcher is closed.
        """
        request = _Request(texts, self._clock())
        if not texts:
            request.finish([])
            return request.answer
        with self._changed:
            if self.closed:
                raise ClosedError
            self._requests.append(request)
            self._changed.notify_all()
        return request.answer

    def take(self, patience: float) -> Batch | None:
        """Return the next batch: as soon as it is full, or when its first text has waited `max_wait` seconds.

        Args:
            patience: seconds after which an empty batch is returned if no text has arrived.

        Returns:
            None if the batcher is closed and nothing is left to score.
        """
        deadline = self._clock() + patience
        with self._changed:
            while True:
                self._requests = deque(request for request in self._requests if not request.answer.cancelled())
                now = self._clock()
                if self._closed_at is not None and (not self._requests or now > self._closed_at + DRAIN_S):
                    self._refuse_waiting()
                    return None
                full = self.waiting >= self.batch_size or self.closed
                due = self._requests[0].arrived + self.max_wait if self._requests else math.inf
                if self._requests and (full or now >= due):
                    return self._next()
                if now >= deadline:
                    return Batch([], [])
                self._changed.wait(min(due, deadline) - now)

    def put(self, batch: Batch, scores: Sequence[float]) -> None:
        """Hand out the scores of a batch, in the order of its texts."""
        if len(scores) != len(batch.texts):
            raise ValueError(f"{len(scores)} scores for {len(batch.texts)} texts")
        first = 0
        for request, count in batch.shares:
            request.scores += scores[first : first + count]
            first += count
            if len(request.scores) < len(request.texts):
                continue
            wrong = [score for score in request.scores if not math.isfinite(score)]
            request.finish(NoScoreError(f"the model gives a score of {wrong[0]}") if wrong else request.scores)

    def close(self) -> None:
        """Take no more texts; those that wait are still scored for a few seconds. May be called in a signal handler."""
        with self._changed:
            self._closed_at = self._clock() if self._closed_at is None else self._closed_at
            self._changed.notify_all()

    def abort(self, batch: Batch | None = None) -> None:
        """Close, and refuse all texts that wait and those of a batch that was not scored."""
        with self._changed:
            self.close()
            self._refuse_waiting()
            for request, _ in batch.shares if batch else ():
                request.finish(ClosedError())

    def _next(self) -> Batch:
        texts: list[Text] = []
        shares: list[tuple[_Request, int]] = []
        while self._requests and len(texts) < self.batch_size:
            request = self._requests[0]
            part = request.texts[request.taken : request.taken + self.batch_size - len(texts)]
            texts += part
            shares.append((request, len(part)))
            request.taken += len(part)
            if request.taken == len(request.texts):
                self._requests.popleft()
        return Batch(texts, shares)

    def _refuse_waiting(self) -> None:
        while self._requests:
            self._requests.popleft().finish(ClosedError())
