"""Reads the body of a request: prompts or conversations with responses, as tokens of the reward model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from megarl.disk import UnreadableError, parse_object
from megarl.errors import MegarlError, first_line
from megarl.logging import get_logger
from megarl.serving.batcher import Text

log = get_logger(__name__)
PROMPTS, CONVERSATIONS, OUTPUTS = "prompts", "conversations", "outputs"


class Reader(Protocol):
    """What a server needs of `RewardReader`."""

    def of_text(self, prompt: str, output: str, where: str) -> Text:
        """Return the tokens of a prompt with a response."""

    def of_messages(self, messages: Sequence[Any], output: str, where: str) -> Text:
        """Return the tokens of a conversation with a response."""


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        where: the place in the request that is wrong, such as outputs[3].
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, where: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.where, self.headers = status, where, headers


def read_question(body: bytes, reader: Reader, max_texts: int, max_tokens: int | None = None) -> list[Text]:
    """Return the tokens of every text in the body of a request.

    Args:
        max_texts: maximum number of texts.
        max_tokens: maximum number of tokens of a text; None for what the reader takes.

    Raises:
        RefusedError: the body is not valid, or a text is too long.
    """
    try:
        question = parse_object(body)
    except UnreadableError as problem:
        raise _invalid("the body", str(problem)) from None
    known = (PROMPTS, CONVERSATIONS, OUTPUTS)
    for key in question:
        if key not in known:
            raise _invalid(_shown(key), f"is not a known key; use {', '.join(known)}")
    if (PROMPTS in question) == (CONVERSATIONS in question):
        raise _invalid(PROMPTS, f"and {CONVERSATIONS} exclude each other, and one of them is needed")
    key = PROMPTS if PROMPTS in question else CONVERSATIONS
    for name in (key, OUTPUTS):
        if not isinstance(question.get(name), list):
            raise _invalid(name, f"is {_kind(question[name])}, not a list" if name in question else "is missing")
    asked, outputs = question[key], question[OUTPUTS]
    if len(asked) != len(outputs):
        raise _invalid(OUTPUTS, f"has {len(outputs)} entries, and {key} has {len(asked)}")
    if len(outputs) > max_texts:
        raise _invalid(OUTPUTS, f"has {len(outputs)} entries; send at most {max_texts} in a request")
    texts = []
    for row, (one, output) in enumerate(zip(asked, outputs, strict=True)):
        texts.append(_read(key, row, one, output, reader))
        if max_tokens is not None and len(texts[-1]) > max_tokens:
            raise _invalid(f"{key}[{row}]", f"has {len(texts[-1])} tokens with its output; send at most {max_tokens}")
    return texts


def _read(key: str, row: int, asked: Any, output: Any, reader: Reader) -> Text:
    """Return the tokens of one text."""
    where = f"{key}[{row}]"
    _require_text(output, f"{OUTPUTS}[{row}]")
    if key == PROMPTS:
        _require_text(asked, where)
    elif not isinstance(asked, list) or not asked:
        raise _invalid(where, f"is {_kind(asked)}; send a list of messages, each with role and content")
    else:
        _require_unicode(json.dumps(asked, ensure_ascii=False), where)
    try:
        tokens = reader.of_text(asked, output, where) if key == PROMPTS else reader.of_messages(asked, output, where)
    except MegarlError as problem:
        said = str(problem)
        raise _invalid(where, said.removeprefix(f"{where}: ") if said.startswith(where) else said) from None
    except Exception as problem:  # tokenizers and chat templates raise many types for texts that they cannot read
        log.debug("%s cannot be read", where, exc_info=True)
        raise _invalid(where, f"cannot be read ({first_line(problem, kind=True)})") from None
    if not tokens:
        raise _invalid(where, "has no tokens, with its output")
    return tokens


def _require_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _invalid(where, f"is {_kind(value)}, not a text")
    _require_unicode(value, where)


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid(where, "holds half a character (lone surrogate)") from None


def _invalid(where: str, what: str) -> RefusedError:
    return RefusedError(422, f"{where}: {what}", where)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return "an empty list" if value == [] else kinds.get(type(value), "a number")


def _shown(key: str) -> str:
    return repr(key[:60])[1:-1].encode("ascii", "backslashreplace").decode()
