"""A reward model that needs no weights, behind the real HTTP server, and requests to it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megarl.config.serve import ServiceConfig
from megarl.errors import DataError
from megarl.serving.app import create_app
from megarl.serving.batcher import Batcher
from megarl.serving.counters import Counters
from megarl.serving.server import HttpServer, Service, follow
from megarl.tokenizers import ByteTokenizer

ALONE: Any = SimpleNamespace(rank=0, run_on_rank0=lambda work: work())
LONGEST = 200


class BytesReader:
    """Reads texts as bytes, with a separator before the output."""

    tokenizer = ByteTokenizer()
    vocab_size = ByteTokenizer().size

    def of_text(self, prompt: str, output: str, where: str) -> list[int]:
        return self._fitting([*self.tokenizer.encode(prompt), 0, *self.tokenizer.encode(output)], where)

    def of_messages(self, messages: Sequence[Any], output: str, where: str) -> list[int]:
        turns = [*messages, {"role": "assistant", "content": output}]
        return self._fitting(self.tokenizer.encode_chat(turns)[0], where)

    def _fitting(self, tokens: list[int], where: str) -> list[int]:
        if len(tokens) > LONGEST:
            raise DataError(f"{where}: {len(tokens)} tokens are more than {LONGEST}: shorten them", where=where)
        return tokens


class HashScorer:
    """Gives every text a number that no other text has; takes some time, may fail, and remembers its batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[int] = []
        self.problem: Exception | None = None
        self.value: float | None = None

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        self.batches.append(len(sequences))
        time.sleep(self.seconds)
        if self.problem is not None:
            raise self.problem
        return torch.tensor([self.value or score_of(one) for one in sequences], dtype=torch.float64)


def score_of(tokens: Sequence[int]) -> float:
    """A number that depends on every token and its position."""
    return (sum((index + 1) * token for index, token in enumerate(tokens)) % 100_003) / 7.0


class Running:
    """A server on a free port, its model in a thread."""

    def __init__(self, scorer: Any, reader: Any, settings: ServiceConfig, token: str | None, model: str) -> None:
        self.scorer, self.reader = scorer, reader
        self.batcher = Batcher(settings.batch_size, settings.max_wait)
        self.counters = Counters(lambda: self.batcher.waiting)
        app = create_app(reader, self.batcher, self.counters, fingerprint=model, settings=settings, token=token)
        bound = socket.create_server(("127.0.0.1", 0))
        self.port: int = bound.getsockname()[1]
        self.service = Service(self.batcher, self.counters, HttpServer(app, bound, settings))
        self.service.http.start()
        self.failure: BaseException | None = None
        self._model = threading.Thread(target=self._run, daemon=True)
        self._model.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        try:
            follow(ALONE, self.scorer, self.service, 0.1)
        except BaseException as problem:
            self.failure = problem
            self.batcher.abort(self.service._batch)

    def close(self) -> None:
        self.batcher.close()
        self._model.join(timeout=20)
        self.service.close()


@contextmanager
def serving(
    scorer: Any = None, reader: Any = None, token: str | None = None, model: str = "m1", **settings: Any
) -> Iterator[Running]:
    running = Running(scorer or HashScorer(), reader or BytesReader(), ServiceConfig(**settings), token, model)
    try:
        yield running
    finally:
        running.close()


def ask(
    port: int,
    body: Any = None,
    *,
    method: str = "POST",
    path: str = "/score",
    headers: dict[str, str] | None = None,
    timeout: float = 30.0,
) -> tuple[int, Any]:
    """The status and the content of an answer, parsed if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        sent = body if body is None or isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body)
        connection.request(method, path, sent, headers or {}, encode_chunked=hasattr(sent, "__next__"))
        response = connection.getresponse()
        content = response.read()
        kind = response.headers.get_content_type()
        return response.status, json.loads(content) if kind == "application/json" else content.decode()
    finally:
        connection.close()


def question(prompts: Sequence[str], outputs: Sequence[str]) -> dict[str, Any]:
    return {"prompts": list(prompts), "outputs": list(outputs)}


def wanted(asked: dict[str, Any]) -> list[float]:
    """The scores of a valid question."""
    reader = BytesReader()
    return [score_of(reader.of_text(p, o, "")) for p, o in zip(asked["prompts"], asked["outputs"], strict=True)]
