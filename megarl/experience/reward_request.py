"""One request to a reward server, and what may be wrong with its answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megarl.command import printable
from megarl.disk import UnreadableError, parse_object
from megarl.errors import DataError, one_line

KEY = "reward.url"
_LARGEST_ANSWER = 1 << 16  # bytes, with another 64 for each score
_LONGEST_MODEL = 200
_SHOWN = 200
SILENT, WRONG, REFUSED, FATAL = "silent", "wrong", "refused", "fatal"


class FailedTry(Exception):  # noqa: N818 - it becomes a `RewardError`
    """A try that gave no scores. The text says what the server did.

    Attributes:
        kind: silent (no answer), wrong (an answer without usable scores), refused (the same request will be refused
            again), fatal (no request can succeed).
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Reply:
    """The content of an answer: a score, or what was given in its place, for every entry."""

    model: str
    scores: list[Any]


@dataclass(frozen=True)
class Entry:
    """A response to score: its index, its prompt (a text or a list of messages), and its text."""

    row: int
    prompt: Any
    output: str
    where: str = ""


@dataclass(frozen=True)
class Post:
    """Sends responses to a server and reads its answer."""

    token: str | None
    timeout_s: float

    def __call__(self, connection: http.client.HTTPConnection, url: str, entries: Sequence[Entry]) -> Reply:
        """Return the server's answer. Raises `FailedTry`."""
        deadline = time.monotonic() + self.timeout_s
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        body = as_json(entries)
        most = _LARGEST_ANSWER + 64 * len(entries)
        try:
            try:
                connection.request("POST", f"{urlsplit(url).path.rstrip('/')}/score", body, headers)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise  # else a server that refuses a request may have answered before it read the whole
            response = connection.getresponse()
            content = _read(response, connection.sock, most, deadline)
        except TimeoutError:
            raise FailedTry(SILENT, f"did not answer within {self.timeout_s:g} s") from None
        except ssl.SSLCertVerificationError as problem:
            raise FailedTry(FATAL, f"has a certificate that is not valid ({problem.verify_message})") from None
        except OSError as problem:
            raise FailedTry(SILENT, f"cannot be reached ({problem.strerror or one_line(problem)})") from None
        except (http.client.HTTPException, ValueError) as problem:
            raise FailedTry(WRONG, f"does not speak HTTP ({printable(one_line(problem))[:_SHOWN]})") from None
        finally:
            connection.close()
        return self._read_answer(response.status, content, len(entries), most)

    def _read_answer(self, status: int, content: bytes, count: int, most: int) -> Reply:
        if status != 200:
            kind = FATAL if status in (401, 403) else REFUSED if 400 <= status < 500 else WRONG
            kind = SILENT if status in (408, 429, 499, 502, 503, 504) else kind
            raise FailedTry(kind, f"answered with status {status}{self._said(content)}")
        if len(content) > most:
            raise FailedTry(WRONG, f"answered with more than {most} bytes")
        try:
            answer = parse_object(content)
        except UnreadableError as problem:
            raise FailedTry(WRONG, f"gave an answer that {problem}{self._said(content)}") from None
        scores, model = answer.get("scores"), answer.get("model")
        if not isinstance(scores, list) or not isinstance(model, str) or len(model) > _LONGEST_MODEL:
            raise FailedTry(WRONG, f"gave an answer without scores and model{self._said(content)}")
        if len(scores) != count:
            raise FailedTry(WRONG, f"gave {len(scores)} scores for {count} responses")
        return Reply(model, scores)

    def _said(self, content: bytes) -> str:
        """Return the beginning of an answer for a message, without the token."""
        text = content[:4000].decode("utf-8", errors="replace")
        with contextlib.suppress(UnreadableError):
            text = str(parse_object(content).get("error", text))
        text = text.replace(self.token, "***") if self.token else text
        text = printable(" ".join(text.split()))
        return f": {text[:_SHOWN]}" if text else ""


def connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """Return a connection to a server, which is opened by the first request."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme == "https":
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout_s, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)


def as_json(entries: Sequence[Entry]) -> bytes:
    """Return the body of a request. All entries have a text as prompt, or all have messages."""
    talks = bool(entries) and not isinstance(entries[0].prompt, str)
    key = "conversations" if talks else "prompts"
    try:
        question = {key: [entry.prompt for entry in entries], "outputs": [entry.output for entry in entries]}
        return json.dumps(question, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        where = entries[0].where
        raise DataError(
            f"{where}: a conversation cannot be sent to a reward server ({one_line(problem)}): use texts and numbers "
            "only",
            key="messages",
            where=where,
        ) from None


def _read(response: http.client.HTTPResponse, sock: socket.socket | None, most: int, deadline: float) -> bytes:
    """Return the content of an answer, or a beginning that is longer than `most`."""
    content = b""
    while len(content) <= most:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if sock is not None:
            sock.settimeout(left)
        block = response.read1(1 << 16)
        if not block:
            break
        content += block
    return content
