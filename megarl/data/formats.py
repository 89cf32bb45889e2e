"""One record to one document: token ids, and which of them the policy is trained to choose.

Three shapes of record are known: a text, a prompt with its completion, and a chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import Tokenizer


@dataclass(frozen=True)
class Document:
    """Tokens that attend to each other.

    Attributes:
        tokens: int32 [time].
        response_mask: uint8 [time], 1 where the token is trained on; 0 at the first, which nothing predicts.
    """

    tokens: np.ndarray
    response_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RecordFormat:
    """How records are read; the fields are the keys of the same name under `data`.

    `chat_template` is the template itself (see `load_chat_template`), or None for the tokenizer's own. `settable` are
    the keys that the configuration has, for messages.
    """

    format: str = "auto"
    text_key: str = "text"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    messages_key: str = "messages"
    chat_template: str | None = None
    loss_on: str = "completion"
    settable: tuple[str, ...] = ("messages_key", "prompt_key", "completion_key", "text_key")

    def encode(self, record: Record, tokenizer: Tokenizer) -> Document:
        """The whole document of a record, however long."""
        shape = self._shape(record)
        try:
            tokens, chosen = self._tokens(record, shape, tokenizer)
        except DataError as error:
            raise error.within(record.where) from error
        response_mask = np.asarray(chosen, dtype=np.uint8)
        if self.loss_on == "all":
            response_mask[:] = 1
        response_mask[:1] = 0
        return Document(np.asarray(tokens, dtype=np.int32), response_mask)

    def _tokens(self, record: Record, shape: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        if shape == "text":
            tokens = [*tokenizer.encode_prompt(self._text(record, self.text_key)), tokenizer.eos_id]
            return tokens, [1] * len(tokens)
        if shape == "completion":
            # The completion is encoded on its own, as generation continues from the prompt's tokens alone.
            prompt = tokenizer.encode_prompt(self._text(record, self.prompt_key))
            completion = [*tokenizer.encode(self._text(record, self.completion_key)), tokenizer.eos_id]
            return prompt + completion, [0] * len(prompt) + [1] * len(completion)
        return self._encode_chat(record, tokenizer)

    def _shape(self, record: Record) -> str:
        needed = {
            "chat": [self.messages_key],
            "completion": [self.prompt_key, self.completion_key],
            "text": [self.text_key],
        }
        if self.format == "auto":
            for shape, keys in needed.items():
                if all(key in record.fields for key in keys):
                    return shape
            wanted = " or ".join("+".join(map(repr, keys)) for keys in needed.values())
            raise DataError(
                f"{record.where}: has none of the expected keys {wanted} (found keys: {_keys(record)}); "
                f"rename them, or set {' or '.join(f'data.{name}' for name in self.settable)}",
                where=record.where,
            )
        for key in needed[self.format]:
            if key not in record.fields:
                raise DataError(
                    f"{record.where}: key {key!r} is missing (found keys: {_keys(record)}), and "
                    f"data.format={self.format} needs it; rename it{self._setting(key)}",
                    key=key,
                    where=record.where,
                )
        return self.format

    def _setting(self, key: str) -> str:
        """Words that name the configuration key whose value is the given key of a record, where there is one."""
        found = [name for name in self.settable if getattr(self, name) == key]
        return f", or set data.{found[0]}" if found else ""

    def _text(self, record: Record, key: str) -> str:
        text = record.fields[key]
        if not isinstance(text, str):
            raise DataError(
                f"key {key!r} holds a {type(text).__name__}; expected a string "
                f"(found keys: {_keys(record)}); fix the record{self._setting(key)}",
                key=key,
                value=text,
            )
        return encodable(text, key)

    def _encode_chat(self, record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        messages = record.fields[self.messages_key]
        if not isinstance(messages, list) or not messages:
            found = f"a {type(messages).__name__}" if not isinstance(messages, list) else "an empty list"
            raise DataError(
                f"key {self.messages_key!r} holds {found}; expected a list of turns, each "
                f"with role and content (found keys: {_keys(record)}); fix it, or set data.messages_key",
                key=self.messages_key,
                value=messages,
            )
        check_encodable(messages)
        try:
            return tokenizer.encode_chat(messages, self.chat_template)
        except DataError:
            if self.loss_on != "all":
                raise
            tokens = tokenizer.apply_chat_template(messages, template=self.chat_template)
            return tokens, [1] * len(tokens)


def _keys(record: Record) -> str:
    return ", ".join(map(str, record.fields)) or "none"


def check_encodable(messages: Sequence[object]) -> None:
    """Refuse a conversation with a turn that holds a lone surrogate."""
    for turn, message in enumerate(messages, 1):
        if isinstance(message, Mapping) and isinstance(message.get("content"), str):
            encodable(message["content"], "content", f"turn {turn}")


def encodable(text: str, key: str, where: str | None = None) -> str:
    """Return the text of a record's key, or refuse one with a lone surrogate, which has no UTF-8 form.

    Args:
        where: which of several texts it is.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = DataError(
            f"key {key!r} holds half a character (lone surrogate) at position {error.start}; fix the record",
            key=key,
            value=text,
        )
        raise (problem.within(where) if where else problem) from error
    return text
