"""Convert a record to tokens and a mask of those to train on: text, completion, chat, dialogue, prompt.

A prompt may be an instruction with its input (Self-Instruct, arXiv 2212.10560). A completion, an output and an answer
are encoded on their own and end with EOS (or with what the chat template ends an answer with), as generation continues
from the prompt's tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.logging import get_logger, info_once
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
"""Keys of a record whose prompt is an instruction, with the text that it is about, and of its completion."""
Encoded = tuple[list[int], list[int]]
"""Tokens, and for each 1 where it is trained on."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Document:
    """Tokens that attend to each other.

    Attributes:
        tokens: int32 [time].
        action_mask: uint8 [time], 1 where the token is trained on; 0 at the first, which nothing predicts.
    """

    tokens: np.ndarray
    action_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RecordFormat:
    """How records are read; the fields are the keys of the same name under `data`.

    `chat_template` is the template itself (see `load_chat_template`), or None for the tokenizer's own. `settable` are
    the keys that the configuration has, and `section` stands before them, for messages.
    """

    format: str = "auto"
    text_key: str = "text"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    messages_key: str = "messages"
    samples_key: str = "samples"
    chat_template: str | None = None
    loss_on: str = "completion"
    settable: tuple[str, ...] = ("messages_key", "prompt_key", "completion_key", "text_key")
    section: str = "data."

    # --- what a record can be read as -------------------------------------------------------------------------------

    def document(self, record: Record, tokenizer: Tokenizer) -> Document:
        """Return a text, a prompt with its completion, or a chat, whole, however long."""

        def encode() -> Document:
            shape = self._shape(record)
            if tokenizer.ends_prompts and (shape == "text" or self.loss_on == "all"):
                raise no_prompt(self.section)
            if shape == "text":
                tokens = [*tokenizer.encode_prompt(self._text(record, self.text_key)), tokenizer.eos_id]
                return as_document((tokens, [1] * len(tokens)))
            if shape == "completion":
                prompt = tokenizer.encode_prompt(self._prompt_text(record))
                found = continued(prompt, self._text(record, self._completion_key(record)), tokenizer)
            else:
                found = self._chat(self._messages(record, self.messages_key), tokenizer)
            return as_document((found[0], [1] * len(found[0])) if self.loss_on == "all" else found)

        return placed(record, encode)

    def prompt(self, record: Record, tokenizer: Tokenizer) -> tuple[str, list[int]]:
        """Return a prompt as text and tokens: a conversation that awaits an answer, or a text."""

        def encode() -> tuple[str, list[int]]:
            fields = record.fields
            if fields.get(self.messages_key) is not None:
                key = self.messages_key
                tokens = tokenizer.encode_chat_prompt(self._messages(record, key), self.chat_template)
                text = tokenizer.decode(tokens)
            else:
                key = INSTRUCTION if self.is_instruction(record) else self.prompt_key
                if key == self.prompt_key and not isinstance(fields.get(key), str):
                    raise DataError(
                        f"has no text under {key!r} and no conversation under {self.messages_key!r}, only "
                        f"{', '.join(map(repr, fields)) or 'nothing'}: set {self.section}prompt_key or "
                        f"{self.section}messages_key",
                        key=key,
                        value=fields.get(key),
                    )
                text = self._prompt_text(record)
                tokens = tokenizer.encode_prompt(text)
            if not tokens and tokenizer.bos_id is not None:
                tokens = [tokenizer.bos_id]  # the response to an empty prompt is a text of its own
            if not tokens:
                raise DataError(
                    f"the prompt under {key!r} is empty and has no tokens: write one, or take the record out",
                    key=key,
                    value=fields[key],
                )
            return text, tokens

        return placed(record, encode)

    def dialogue(self, record: Record, tokenizer: Tokenizer) -> Document:
        """Return a dialogue as one document. `samples_key` holds a text (all tokens but the first are output) or a list
        that alternates prompt and output; without it, `messages_key` is read."""

        def encode() -> Document:
            key, fields = self.samples_key, record.fields
            if key not in fields and self.messages_key in fields:
                key = self.messages_key
                messages = self._messages(record, key)
                if isinstance(messages[0], Mapping) and messages[0].get("role") == "assistant":
                    raise starts_with_output(key, messages)
                tokens, mask = self._chat(messages, tokenizer)
            else:
                tokens, mask = _turns(fields.get(key), key, tokenizer)
            if not any(mask):
                raise DataError(
                    f"{key!r} holds no action: give it an output, or take the record out",
                    key=key,
                    value=fields.get(key),
                )
            if mask[0]:
                raise starts_with_output(key, fields[key])
            return as_document((tokens, mask))

        return placed(record, encode)

    def is_instruction(self, record: Record) -> bool:
        """Return whether a record has an instruction in the place of a prompt or a conversation."""
        has_prompt = any(record.fields.get(key) is not None for key in (self.prompt_key, self.messages_key))
        return not has_prompt and record.fields.get(INSTRUCTION) is not None

    # --- inside -----------------------------------------------------------------------------------------------------

    def _has_prompt_text(self, record: Record) -> bool:
        return record.fields.get(self.prompt_key) is not None or self.is_instruction(record)

    def _prompt_text(self, record: Record) -> str:
        """Return the prompt: a text, or an instruction and its input with a blank line after each."""
        if not self.is_instruction(record):
            return self._text(record, self.prompt_key)
        info_once(
            log,
            f"records without {self.prompt_key!r} that have {INSTRUCTION!r}: the prompt is the instruction and, if "
            f"there is one, the {INPUT}, with a blank line after each (docs/data.md, Instructions)",
        )
        keys = [INSTRUCTION] if record.fields.get(INPUT) is None else [INSTRUCTION, INPUT]
        return "".join(f"{text}\n\n" for key in keys if (text := self._text(record, key)))

    def _completion_key(self, record: Record) -> str:
        """Return the key of a single response: "output" beside an instruction, unless the usual key is there."""
        if self.is_instruction(record) and record.fields.get(self.completion_key) is None:
            return OUTPUT
        return self.completion_key

    def _has_messages(self, record: Record) -> bool:
        """Whether the prompt is a conversation: under its own key, or in the place of the prompt's text."""
        in_place = isinstance(record.fields.get(self.prompt_key), list)
        return in_place or record.fields.get(self.messages_key) is not None

    def _conversation(self, record: Record) -> list[Any]:
        key = self.messages_key if record.fields.get(self.messages_key) is not None else self.prompt_key
        return self._messages(record, key)

    def _shape(self, record: Record) -> str:
        needed: dict[str, list[str]] = {
            "chat": [self.messages_key],
            "completion": [self.prompt_key, self.completion_key],
            "text": [self.text_key],
        }
        if self.format in ("auto", "completion") and self.is_instruction(record):
            key = self._completion_key(record)
            if key in record.fields:
                return "completion"
            needed["completion"] = [INSTRUCTION, key]
        if self.format == "auto":
            for shape, keys in needed.items():
                if all(key in record.fields for key in keys):
                    return shape
            described = [*needed.values(), [INSTRUCTION, OUTPUT]]
            wanted = " or ".join("+".join(map(repr, keys)) for keys in described)
            raise DataError(
                f"has none of the expected keys {wanted} (found keys: {keys_of(record)}); rename them, or set "
                f"{' or '.join(f'{self.section}{name}' for name in self.settable)}",
                key=wanted,
            )
        for key in needed[self.format]:
            if key not in record.fields:
                raise DataError(
                    f"key {key!r} is missing (found keys: {keys_of(record)}), and {self.section}format={self.format} "
                    f"needs it; rename it{self._setting(key)}",
                    key=key,
                )
        return self.format

    def _setting(self, key: str) -> str:
        """Words that name the configuration key whose value is the given key of a record, where there is one."""
        found = [name for name in self.settable if getattr(self, name) == key]
        return f", or set {self.section}{found[0]}" if found else ""

    def _text(self, record: Record, key: str) -> str:
        return self._checked_text(record, record.fields.get(key), key)

    def _checked_text(self, record: Record, text: Any, key: str) -> str:
        """Return a value under a key of a record, or refuse one that is no text."""
        if not isinstance(text, str):
            raise DataError(
                f"key {key!r} holds {kind_of(text)}; expected a string (found keys: {keys_of(record)}); fix the record"
                f"{self._setting(key)}",
                key=key,
                value=text,
            )
        return encodable(text, key)

    def _messages(self, record: Record, key: str) -> list[Any]:
        return self._checked_messages(record, record.fields[key], key)

    def _checked_messages(self, record: Record, messages: Any, key: str) -> list[Any]:
        """Return a value under a key of a record, or refuse one that is no list of messages."""
        if not isinstance(messages, list) or not messages:
            raise DataError(
                f"key {key!r} holds {kind_of(messages)}; expected a list of turns, each with role and content (found "
                f"keys: {keys_of(record)}); fix the record{self._setting(key)}",
                key=key,
                value=messages,
            )
        for turn, message in enumerate(messages, 1):
            if isinstance(message, Mapping) and isinstance(message.get("content"), str):
                encodable(message["content"], "content", f"turn {turn}")
        return messages

    def _chat(self, messages: list[Any], tokenizer: Tokenizer) -> Encoded:
        try:
            return tokenizer.encode_chat(messages, self.chat_template)
        except DataError:
            if self.loss_on != "all":
                raise
            tokens = tokenizer.apply_chat_template(messages, template=self.chat_template)
            return tokens, [1] * len(tokens)


def placed(record: Record, encode: Callable[[], _T]) -> _T:
    """Encode, and prefix errors with the record's location."""
    try:
        return encode()
    except DataError as problem:
        raise problem.within(record.where) from problem.__cause__


def as_document(encoded: Encoded) -> Document:
    """Return encoded tokens as a document."""
    tokens, mask = encoded
    action_mask = np.asarray(mask, dtype=np.uint8)
    action_mask[:1] = 0
    return Document(np.asarray(tokens, dtype=np.int32), action_mask)


def continued(prompt: list[int], text: str, tokenizer: Tokenizer) -> Encoded:
    """Return a prompt followed by a text and EOS, which are trained on."""
    response = [*tokenizer.encode(text), tokenizer.eos_id]
    return prompt + response, [0] * len(prompt) + [1] * len(response)


def _turns(sample: Any, key: str, tokenizer: Tokenizer) -> Encoded:
    if isinstance(sample, str):
        if tokenizer.ends_prompts:
            raise no_prompt("")
        tokens = [*tokenizer.encode_prompt(encodable(sample, key)), tokenizer.eos_id]
        return tokens, [0] + [1] * (len(tokens) - 1)
    if not isinstance(sample, list | tuple) or not all(isinstance(turn, str) for turn in sample):
        raise DataError(
            f"holds {'nothing' if sample is None else kind_of(sample)} under {key!r}: give a text, [prompt, output] or "
            "a longer list of texts in turn",
            key=key,
            value=sample,
        )
    if len(sample) % 2:
        raise DataError(
            f"{key!r} holds {len(sample)} turns, so its last prompt has no action after it: prompts and outputs take "
            "turns, from a prompt to an output",
            key=key,
            value=sample,
        )
    tokens, mask = [], []
    for number, text in enumerate(sample):
        is_output = number % 2
        if is_output and not text:
            raise DataError(
                f"turn {number + 1} of {key!r} is an output with no action: write one, or take the record out",
                key=key,
                value=sample,
                where=f"turn {number + 1}",
            )
        encodable(text, key, f"turn {number + 1}")
        turn = tokenizer.encode(text) if number else tokenizer.encode_prompt(text)
        turn = [*turn, tokenizer.eos_id] if is_output else turn
        tokens += turn
        mask += [is_output] * len(turn)
    return tokens, mask


def no_prompt(section: str) -> DataError:
    """Return the error for a text that is learned whole by a model whose encoder reads prompts."""
    return DataError(
        "has no prompt apart from what is learned, and the encoder of model.encoder reads a prompt: give a prompt and "
        f"its completion, with {section}loss_on=completion",
        key=f"{section}loss_on",
        offers={f"{section}loss_on": ["completion"]},
    )


def starts_with_output(key: str, sample: Any) -> DataError:
    """Return the error for a sample that has no prompt."""
    return DataError(
        f"{key!r} starts with an output, which nothing comes before: put a prompt first", key=key, value=sample
    )


def kind_of(value: Any) -> str:
    """Return what kind of value was found, for messages."""
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def keys_of(record: Record) -> str:
    """Return the keys that a record has, for messages."""
    return ", ".join(map(str, record.fields)) or "none"


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
