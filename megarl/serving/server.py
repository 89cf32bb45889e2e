"""The HTTP server in its own thread, and the loop in which every process runs the model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import uvicorn
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from megarl.config.serve import ServiceConfig
from megarl.errors import NumericsError, UnavailableError
from megarl.parallel.grid import Grid
from megarl.serving.app import FrontDoor
from megarl.serving.batcher import Batch, Batcher, Text
from megarl.serving.counters import Counters

_GRACE_S = 5
"""Seconds that open requests have to end when the server stops."""
_START_S = 30.0
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class TokenScorer(Protocol):
    """What the loop needs of `ModelScorer`."""

    def score_tokens(self, sequences: Sequence[Text]) -> Tensor:
        """Return the score of each sequence of tokens, on every rank."""


def bounded_connections(most: int, patience: float) -> type[H11Protocol]:
    """Return uvicorn's connection class with two limits that uvicorn lacks.

    Args:
        most: maximum number of open connections. Uvicorn counts a connection only when its headers are complete.
        patience: seconds in which the headers of a request must be complete, however often bytes arrive. Uvicorn has
            such a limit only for the wait between two requests.
    """

    class Connection(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(_BUSY)
                transport.close()
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Watch the time while no request is being answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._late is None:
                self._late = self.loop.call_later(patience, self.transport.abort)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Connection


class HttpServer:
    """Serves an application on a bound socket, in a thread."""

    def __init__(self, app: FrontDoor, bound: socket.socket, settings: ServiceConfig) -> None:
        """Nothing is answered before `start`."""
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=bounded_connections(2 * settings.max_requests + 16, settings.read_timeout),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self.port: int = bound.getsockname()[1]
        self._socket, self._server = bound, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="http", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, and wait until the server answers."""
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self.alive or time.monotonic() > deadline:
                raise UnavailableError("the HTTP server did not start: see the log", key="serve.port")
            time.sleep(0.01)

    def stop(self) -> None:
        """Close the connections that are idle, wait a few seconds for the others, and end the thread."""
        self._server.should_exit = True
        self._thread.join(timeout=2 * _GRACE_S)
        self._socket.close()


class Service:
    """The part of a server that only the first process has: the queue, its counts and the HTTP server."""

    def __init__(self, batcher: Batcher, counters: Counters, http: HttpServer) -> None:
        self.batcher, self.counters, self.http = batcher, counters, http
        self._batch: Batch | None = None
        self._taken_at = 0.0

    @property
    def port(self) -> int:
        """The port on which the server listens."""
        return self.http.port

    def next_texts(self, patience: float) -> list[Text] | None:
        """Return the texts of the next batch, none after `patience` seconds without any; None to stop."""
        if not self.http.alive:
            raise UnavailableError("the HTTP server has ended: see the log", key="serve.port")
        self._batch = self.batcher.take(patience)
        self._taken_at = time.perf_counter()
        return None if self._batch is None else self._batch.texts

    def answer(self, scores: Sequence[float]) -> None:
        """Hand out the scores of the batch."""
        assert self._batch is not None
        self.counters.add_batch(len(scores), time.perf_counter() - self._taken_at)
        self.batcher.put(self._batch, scores)
        self._batch = None

    def close(self) -> None:
        """Refuse what has no scores, and stop the HTTP server."""
        self.batcher.abort(self._batch)
        self.http.stop()


def warm_up(scorer: TokenScorer, count: int, length: int, vocabulary: int) -> None:
    """Score one batch of `count` texts of `length` tokens, so that a lack of memory and bad weights appear before a
    request. Every rank calls this."""
    half = max(1, length // 2)  # which an encoder reads
    texts = [Text(((row + 7919 * place) % vocabulary for place in range(length)), half) for row in range(count)]
    scores = scorer.score_tokens(texts)
    wrong = scores[~torch.isfinite(scores)]
    if len(wrong):
        raise NumericsError(
            f"the reward model gives {len(wrong)} of {count} texts of {length} tokens the score {float(wrong[0])}: "
            "check its weights (model.path), and whether trainer.precision suits them",
            key="model.path",
        )


def follow(grid: Grid, scorer: TokenScorer, service: Service | None, patience: float) -> None:
    """Score batches until the first process stops. Every rank calls this; the first has the service.

    Args:
        patience: seconds after which the first process sends an empty batch, so that the others do not wait longer.
    """
    while True:
        texts = grid.run_on_rank0(lambda: service.next_texts(patience) if service else None)
        if texts is None:
            return
        if texts:
            scores = scorer.score_tokens(texts)
            if service is not None:
                service.answer(scores.tolist())
