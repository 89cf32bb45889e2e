"""The web application: POST /score, GET /health and GET /metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from megarl.config.serve import ServiceConfig
from megarl.serving.batcher import Batcher, ClosedError, NoScoreError
from megarl.serving.counters import CONTENT_TYPE, Counters
from megarl.serving.description import SCORE_ANSWERS, SCORE_REQUEST
from megarl.serving.questions import Reader, RefusedError, read_question

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
SCORE, HEALTH, METRICS = "/score", "/health", "/metrics"
GONE = 499
"""The status under which a request is counted whose client closed the connection."""
_LOOK_S = 0.2
"""Seconds after which a read that waits looks whether the server is stopping."""


class Disconnected(Exception):  # noqa: N818 - it is not an error
    """The client closed the connection."""


def create_app(
    reader: Reader,
    batcher: Batcher,
    counters: Counters,
    *,
    fingerprint: str,
    settings: ServiceConfig,
    token: str | None = None,
) -> FrontDoor:
    """Return the ASGI application of a server.

    Args:
        reader: turns prompts and responses into tokens. It is called in one thread.
        batcher: the queue in front of the model.
        counters: what GET /metrics shows.
        fingerprint: identifier of the model, in every answer.
        settings: limits of a request.
        token: token that requests must send; None for none.
    """
    # Pages to browse would load scripts from elsewhere. The description of the interface is /openapi.json.
    app = FastAPI(title="megarl reward model", docs_url=None, redoc_url=None)
    encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    open_bytes = OpenBytes(settings.max_open_bytes)

    @app.post(SCORE, responses=SCORE_ANSWERS, openapi_extra=SCORE_REQUEST)
    async def score(request: Request) -> Response:
        loop = asyncio.get_running_loop()
        with open_bytes.share() as add:
            body = await _read_body(request, settings, batcher, add)
            limits = settings.max_texts, settings.max_tokens
            texts = await loop.run_in_executor(encoder, read_question, body, reader, *limits)
            del body
            scores = await _scores(request, batcher, texts)
        return JSONResponse({"scores": scores, "model": fingerprint})

    @app.get(HEALTH)
    async def health() -> Response:
        if batcher.closed:
            raise _stopping()
        return JSONResponse({"status": "ok", "model": fingerprint})

    @app.get(METRICS)
    async def metrics() -> Response:
        return PlainTextResponse(counters.text(), media_type=CONTENT_TYPE)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return _error(RefusedError(error.status_code, f"{error.detail}: {_served()}", headers=headers))

    @app.exception_handler(Disconnected)
    async def gone(_: Request, error: Disconnected) -> Response:
        return Response(status_code=GONE)

    return FrontDoor(app, counters, settings.max_requests, token)


class FrontDoor:
    """Checks the token and the number of requests before the application reads anything, and counts answers."""

    def __init__(self, app: FastAPI, counters: Counters, max_requests: int, token: str | None) -> None:
        self.app, self.counters, self.max_requests = app, counters, max_requests
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._open = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in (SCORE, HEALTH, METRICS) else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counters.add_request(path, message["status"])
            await send(message)

        refusal = self._refusal(path, scope)
        if refusal is not None:
            await _error(refusal)(scope, receive, counted)
            return
        self._open += 1
        try:
            await self.app(scope, receive, counted)
        finally:
            self._open -= 1

    def _refusal(self, path: str, scope: Message) -> RefusedError | None:
        if path == HEALTH:
            return None
        if self._expected is not None:
            sent = [value for name, value in scope["headers"] if name == b"authorization"]
            # The comparison takes the same time for every token of the same length.
            if len(sent) != 1 or not hmac.compare_digest(sent[0], self._expected):
                headers = {"WWW-Authenticate": "Bearer"}
                return RefusedError(401, "send the server's token as 'Authorization: Bearer TOKEN'", headers=headers)
        if self._open >= self.max_requests:
            return RefusedError(503, f"{self._open} requests are being served: try again later", headers=_LATER)
        return None


class OpenBytes:
    """Counts the bytes of all requests that are read or answered. Only the thread of the HTTP server uses it."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that adds bytes of a request, or refuses it. They count until the block ends."""
        own = 0

        def add(count: int) -> None:
            nonlocal own
            if self.held + count > self.most:
                raise RefusedError(
                    503, f"{self.held} bytes of requests are being served: try again later", headers=_LATER
                )
            own += count
            self.held += count

        try:
            yield add
        finally:
            self.held -= own


_LATER = {"Retry-After": "1"}


def _stopping() -> RefusedError:
    return RefusedError(503, "the server is stopping", headers=_LATER)


def _error(error: RefusedError) -> JSONResponse:
    content = {"error": str(error), **({} if error.where is None else {"where": error.where})}
    return JSONResponse(content, error.status, headers=error.headers)


def _served() -> str:
    return f"this server has POST {SCORE}, GET {HEALTH} and GET {METRICS}"


async def _read_body(request: Request, settings: ServiceConfig, batcher: Batcher, add: Callable[[int], None]) -> bytes:
    """Return the body of a request. What exceeds a limit is refused while it arrives; the server discards the rest.

    `add` counts the bytes of every part.
    """
    most = settings.max_request_bytes
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > most:
        raise RefusedError(413, f"the request is larger than {most} bytes: send fewer texts")
    deadline = time.monotonic() + settings.read_timeout
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        if batcher.closed:
            raise _stopping()
        try:
            message = await asyncio.wait_for(request.receive(), _LOOK_S)
        except asyncio.TimeoutError:
            if time.monotonic() < deadline:
                continue
            raise RefusedError(
                408, f"the request did not arrive within {settings.read_timeout:g} s", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > most:
            raise RefusedError(413, f"the request is larger than {most} bytes: send fewer texts")
        add(len(part))
        parts.append(part)
    return b"".join(parts)


async def _scores(request: Request, batcher: Batcher, texts: list[Any]) -> list[float]:
    """Return the scores of texts. If the client closes the connection, its texts leave the queue."""
    try:
        answer = asyncio.wrap_future(batcher.submit(texts))
    except ClosedError:
        raise _stopping() from None
    left = asyncio.ensure_future(_disconnect(request))
    try:
        either: set[asyncio.Future[Any]] = {answer, left}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Disconnected
        return answer.result()
    except ClosedError:
        raise _stopping() from None
    except NoScoreError as problem:
        raise RefusedError(500, f"{problem}: check its weights") from None
    finally:
        left.cancel()
        answer.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        """The body has been read; only the end of the connection is of interest."""
