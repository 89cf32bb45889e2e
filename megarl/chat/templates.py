"""Jinja chat templates: the environment that published templates expect, and `{% generation %}` marks.

Templates get the same variables and functions as in transformers, except for the date, which is constant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

from megarl.errors import DataError, UnavailableError, first_line

Message = Mapping[str, Any]
Span = tuple[int, int]

DATE = datetime(2024, 7, 26)
"""The result of `strftime_now`: the default date of Llama's templates, so that tokens do not depend on the day."""

# Characters that Unicode reserves for use inside programs. They delimit a generation block until the text
# is whole, so that blocks are found inside of macros and of `{% set %}` too.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_LARGEST = 10**6
"""Maximum number of characters, or list items, that one operation of a template may create."""
_WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent")
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A template with the special tokens that it uses by name.

    Attributes:
        marked: whether the template marks what the assistant generates with `{% generation %}` blocks.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source, self.variables = source, dict(variables)
        self.marked = bool(_GENERATION.search(source))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Render a conversation; a template that fails raises `DataError` with the template's own message."""
        text = self._render(messages, add_generation_prompt)
        return text.replace(_OPEN, "").replace(_CLOSE, "") if self.marked else text

    def render_marked(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Render a conversation, and return the character spans of its generation blocks."""
        for turn, message in enumerate(messages, 1):
            if any(border in str(message.get("content")) for border in (_OPEN, _CLOSE)):
                raise DataError(
                    f"turn {turn} holds U+FDD0 or U+FDD1, which are not valid in text: take it out of the record",
                    where=f"turn {turn}",
                )
        return _spans(self._render(messages, add_generation_prompt))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        shown = [_shown(message) for message in messages]
        settings = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            try:
                return str(_compiled(self.source).render(messages=shown, **settings, **self.variables))
            except Exception:
                if all("content" in message for message in shown):
                    raise
                # A turn that calls a tool may have no content, but some templates read it anyway.
                shown = [{"content": ""} | message for message in shown]
                return str(_compiled(self.source).render(messages=shown, **settings, **self.variables))
        except UnavailableError:
            raise
        except Exception as error:  # a template may raise anything; the message names the record
            roles = ", ".join(str(message["role"]) for message in messages) or "none"
            raise DataError(
                f"the chat template failed on turns with roles [{roles}] ({first_line(error, kind=True)}); "
                "change the record, or set data.chat_template to a template that accepts it",
                key="data.chat_template",
            ) from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raise for turns without a role, or without content unless they call a tool."""
    if not isinstance(messages, list | tuple):
        raise DataError(
            f"messages is a {type(messages).__name__}; expected a list of turns", key="messages", value=messages
        )
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"turn {turn} is a {type(message).__name__}; expected an object with role and content",
                value=message,
                where=f"turn {turn}",
            )
        needed = ("role",) if message.get("tool_calls") and message.get("content") is None else ("role", "content")
        for key in needed:
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "missing"
                keys = ", ".join(map(str, message))
                raise DataError(
                    f"turn {turn}: {key!r} is {found}; expected a string (found keys: {keys})",
                    key=key,
                    value=message.get(key),
                    where=f"turn {turn}",
                )


def _spans(text: str) -> tuple[str, list[Span]]:
    """Return the text without the delimiters of generation blocks, and the spans of the outermost blocks."""
    spans: list[Span] = []
    pieces: list[str] = []
    length = depth = start = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = length if depth == 0 else start
            depth += 1
        elif piece == _CLOSE:
            depth -= 1
            if depth == 0 and length > start:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _shown(message: Message) -> dict[str, Any]:
    """Return a message for the template: without empty keys, and with reasoning under all of its names."""
    shown = {key: value for key, value in message.items() if value is not None}
    reasoning = next((shown[key] for key in REASONING if key in shown), None)
    return shown if reasoning is None else {"thinking": reasoning, **shown, "reasoning_content": reasoning}


def without_reasoning(message: Message) -> dict[str, Any]:
    """Return a message without the keys that contain reasoning."""
    return {key: value for key, value in message.items() if key not in REASONING}


def _strftime_now(form: str) -> str:
    return DATE.strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return plain JSON; Jinja's own filter escapes some characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    """Return whether a repetition, a power, or a `%` with a width creates more than `_LARGEST` characters or items."""
    if operator == "*":
        return any(
            isinstance(part, str | list | tuple) and isinstance(times, int) and len(part) * times > _LARGEST
            for part, times in ((left, right), (right, left))
        )
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _LARGEST
    return isinstance(left, str) and bool(re.search(r"%[^a-zA-Z%]*([0-9]{7}|\*)", left))


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


@cache
def _environment() -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.ext import loopcontrols as loop_controls
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UnavailableError("data.chat_template: pip install jinja2", key="data.chat_template") from error

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`: the body between two delimiters."""

        tags = {"generation"}  # noqa: RUF012  Jinja declares it so

        def parse(self, parser: Any) -> list[Any]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opening, closing = (nodes.Output([nodes.TemplateData(border)], lineno=line) for border in (_OPEN, _CLOSE))
            return [opening, *body, closing]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    class Bounded(ImmutableSandboxedEnvironment):
        """Limits the memory of one operation or call of a template. A loop that doubles a text is not limited."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _is_huge(operator, left, right):
                raise TemplateError(f"the result of {operator} is longer than any chat")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, *given: Any, **named: Any) -> Any:
            text = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # Jinja wraps str.format
            refuse_wide(getattr(called, "__name__", ""), text, *given, *named.values())
            return super().call(context, called, *given, **named)

    def refuse_wide(name: str, text: Any, *given: Any) -> None:
        wide = name in _WIDENING and any(isinstance(one, int) and one > _LARGEST for one in given)
        if wide or (name in ("format", "format_map") and re.search(r"[0-9]{7}", str(text))):
            raise TemplateError(f"the result of {name} is longer than any chat")

    def bounded(name: str) -> Callable[..., Any]:
        filter_ = environment.filters[name]

        def call(value: Any, *given: Any, **named: Any) -> Any:
            refuse_wide(name, value, *given, *named.values())
            return filter_(value, *given, **named)

        return call

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loop_controls])
    environment.filters |= {name: bounded(name) for name in ("center", "indent", "format")}
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment
