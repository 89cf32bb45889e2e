"""Convert a record to tokens and a mask of those to train on: text, completion, chat, dialogue, pair, prompt.

A completion, an output and an answer are encoded on their own and end with EOS (or with what the chat template ends an
answer with), as generation continues from the prompt's tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np

from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import Tokenizer

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
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    label_key: str = "label"
    chat_template: str | None = None
    loss_on: str = "completion"
    settable: tuple[str, ...] = ("messages_key", "prompt_key", "completion_key", "text_key")
    section: str = "data."

    # --- what a record can be read as -------------------------------------------------------------------------------

    def document(self, record: Record, tokenizer: Tokenizer) -> Document:
        """Return a text, a prompt with its completion, or a chat, whole, however long."""

        def encode() -> Document:
            shape = self._shape(record)
            if shape == "text":
                tokens = [*tokenizer.encode_prompt(self._text(record, self.text_key)), tokenizer.eos_id]
                return _document((tokens, [1] * len(tokens)))
            if shape == "completion":
                prompt = tokenizer.encode_prompt(self._text(record, self.prompt_key))
                found = _continued(prompt, self._text(record, self.completion_key), tokenizer)
            else:
                found = self._chat(self._messages(record, self.messages_key), tokenizer)
            return _document((found[0], [1] * len(found[0])) if self.loss_on == "all" else found)

        return _placed(record, encode)

    def prompt(self, record: Record, tokenizer: Tokenizer) -> tuple[str, list[int]]:
        """Return a prompt as text and tokens: a conversation that awaits an answer, or a text."""

        def encode() -> tuple[str, list[int]]:
            fields = record.fields
            if fields.get(self.messages_key) is not None:
                key = self.messages_key
                tokens = tokenizer.encode_chat_prompt(self._messages(record, key), self.chat_template)
                text = tokenizer.decode(tokens)
            else:
                key = self.prompt_key
                if not isinstance(fields.get(key), str):
                    raise DataError(
                        f"has no text under {key!r} and no conversation under {self.messages_key!r}, only "
                        f"{', '.join(map(repr, fields)) or 'nothing'}: set {self.section}prompt_key or "
                        f"{self.section}messages_key",
                        key=key,
                        value=fields.get(key),
                    )
                text = self._text(record, key)
                tokens = tokenizer.encode_prompt(text)
            if not tokens:
                raise DataError(
                    f"the prompt under {key!r} is empty and has no tokens: write one, or take the record out",
                    key=key,
                    value=fields[key],
                )
            return text, tokens

        return _placed(record, encode)

    def dialogue(self, record: Record, tokenizer: Tokenizer) -> Document:
        """Return a dialogue as one document. `samples_key` holds a text (all tokens but the first are output) or a list
        that alternates prompt and output; without it, `messages_key` is read."""

        def encode() -> Document:
            key, fields = self.samples_key, record.fields
            if key not in fields and self.messages_key in fields:
                key = self.messages_key
                messages = self._messages(record, key)
                if isinstance(messages[0], Mapping) and messages[0].get("role") == "assistant":
                    raise _starts_with_output(key, messages)
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
                raise _starts_with_output(key, fields[key])
            return _document((tokens, mask))

        return _placed(record, encode)

    def pair(self, record: Record, tokenizer: Tokenizer) -> tuple[Document, Document]:
        """Return the preferred and the rejected response, each preceded by the prompt, which is not trained on.

        Both are texts, after a prompt that is a text or a conversation; or both are messages, after a conversation.
        Without a prompt, it is what both begin with: the same tokens, or the same turns.
        """

        def encode() -> tuple[Document, Document]:
            keys = (self.chosen_key, self.rejected_key)
            both = [record.fields.get(key) for key in keys]
            if both[0] == both[1] and both[0] is not None:
                raise DataError(
                    f"{keys[0]!r} and {keys[1]!r} hold the same: give two responses, or take the record out",
                    key=keys[0],
                    value=both[0],
                )
            if all(isinstance(response, str) for response in both):
                texts = [self._text(record, key) for key in keys]
                for key, text in zip(keys, texts, strict=True):
                    _require_response(text, key)
                if self._has_messages(record):
                    messages = self._conversation(record)
                elif record.fields.get(self.prompt_key) is not None:
                    prompt = self._prompt(record, tokenizer)
                    chosen, rejected = (_document(_continued(prompt, text, tokenizer)) for text in texts)
                    return _differing(chosen, rejected, keys)
                else:
                    return _transcripts(texts, keys, self.prompt_key, tokenizer)
                answers = [[{"role": "assistant", "content": text}] for text in texts]
            elif all(isinstance(response, list) for response in both):
                answers = [self._messages(record, key) for key in keys]
                messages = self._conversation(record) if self._has_messages(record) else []
                if messages and all(answer[0] == messages[0] for answer in answers):
                    messages = []  # the lists are whole conversations
                alike = len(list(takewhile(lambda turns: turns[0] == turns[1], zip(*answers, strict=False))))
                messages, answers = [*messages, *answers[0][:alike]], [answer[alike:] for answer in answers]
            else:
                wrong = 1 if isinstance(both[0], str) else 0
                found = " and ".join(f"{_kind(one)} under {key!r}" for one, key in zip(both, keys, strict=True))
                raise DataError(
                    f"holds {found}: give two texts, or two lists of messages{self._setting(keys[wrong])}",
                    key=keys[wrong],
                    value=both[wrong],
                )
            chosen, rejected = (
                _document(self._answer(messages, answer, key, tokenizer))
                for key, answer in zip(keys, answers, strict=True)
            )
            return _differing(chosen, rejected, keys)

        return _placed(record, encode)

    def labelled(self, record: Record, tokenizer: Tokenizer) -> list[tuple[Document, bool]]:
        """Return responses, each preceded by its prompt, and whether it is desirable: one, or the two of a pair."""
        if record.fields.get(self.completion_key) is None and record.fields.get(self.chosen_key) is not None:
            chosen, rejected = self.pair(record, tokenizer)
            return [(chosen, True), (rejected, False)]

        def encode() -> tuple[Document, bool]:
            key, label = self.completion_key, record.fields.get(self.label_key)
            if isinstance(label, np.bool_ | np.integer):
                label = label.item()
            if not isinstance(label, bool | int) or label not in (0, 1):
                raise DataError(
                    f"key {self.label_key!r} holds {_kind(label) if label is None else repr(label)}; expected true or "
                    f"false (found keys: {_keys(record)}); fix the record{self._setting(self.label_key)}",
                    key=self.label_key,
                    value=label,
                )
            response = record.fields.get(key)
            if isinstance(response, list):
                if not self._has_messages(record):
                    raise DataError(
                        f"{key!r} is a list of messages, and the prompt is not: give the prompt as messages, or the "
                        "response as text",
                        key=key,
                        value=response,
                    )
                messages = self._conversation(record)
                return _document(self._answer(messages, self._messages(record, key), key, tokenizer)), bool(label)
            text = self._text(record, key)
            _require_response(text, key)
            if self._has_messages(record):
                answer = [{"role": "assistant", "content": text}]
                return _document(self._answer(self._conversation(record), answer, key, tokenizer)), bool(label)
            return _document(_continued(self._prompt(record, tokenizer), text, tokenizer)), bool(label)

        return [_placed(record, encode)]

    def has_prompt(self, record: Record) -> bool:
        """Return whether a record of a pair has a prompt, or its responses are lists of messages."""
        lists = isinstance(record.fields.get(self.chosen_key), list)
        return lists or self._has_messages(record) or record.fields.get(self.prompt_key) is not None

    # --- inside -----------------------------------------------------------------------------------------------------

    def _prompt(self, record: Record, tokenizer: Tokenizer) -> list[int]:
        tokens = tokenizer.encode_prompt(self._text(record, self.prompt_key))
        if not tokens:
            raise DataError(
                f"the prompt under {self.prompt_key!r} is empty and has no tokens: write one, or take the record out",
                key=self.prompt_key,
                value="",
            )
        return tokens

    def _has_messages(self, record: Record) -> bool:
        """Whether the prompt is a conversation: under its own key, or in the place of the prompt's text."""
        in_place = isinstance(record.fields.get(self.prompt_key), list)
        return in_place or record.fields.get(self.messages_key) is not None

    def _conversation(self, record: Record) -> list[Any]:
        key = self.messages_key if record.fields.get(self.messages_key) is not None else self.prompt_key
        return self._messages(record, key)

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
                f"has none of the expected keys {wanted} (found keys: {_keys(record)}); rename them, or set "
                f"{' or '.join(f'{self.section}{name}' for name in self.settable)}",
                key=wanted,
            )
        for key in needed[self.format]:
            if key not in record.fields:
                raise DataError(
                    f"key {key!r} is missing (found keys: {_keys(record)}), and {self.section}format={self.format} "
                    f"needs it; rename it{self._setting(key)}",
                    key=key,
                )
        return self.format

    def _setting(self, key: str) -> str:
        """Words that name the configuration key whose value is the given key of a record, where there is one."""
        found = [name for name in self.settable if getattr(self, name) == key]
        return f", or set {self.section}{found[0]}" if found else ""

    def _text(self, record: Record, key: str) -> str:
        text = record.fields.get(key)
        if not isinstance(text, str):
            raise DataError(
                f"key {key!r} holds {_kind(text)}; expected a string (found keys: {_keys(record)}); fix the record"
                f"{self._setting(key)}",
                key=key,
                value=text,
            )
        return encodable(text, key)

    def _messages(self, record: Record, key: str) -> list[Any]:
        messages = record.fields[key]
        if not isinstance(messages, list) or not messages:
            raise DataError(
                f"key {key!r} holds {_kind(messages)}; expected a list of turns, each with role and content (found "
                f"keys: {_keys(record)}); fix the record{self._setting(key)}",
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

    def _answer(self, messages: list[Any], answer: list[Any], key: str, tokenizer: Tokenizer) -> Encoded:
        """The whole conversation, of which the answer alone is trained on."""
        if not answer or not isinstance(answer[-1], Mapping) or answer[-1].get("role") != "assistant":
            raise DataError(f"{key!r} ends with no answer of the assistant's own: give it one", key=key, value=answer)
        if not answer[-1].get("content"):
            raise DataError(
                f"the response under {key!r} is empty: write one, or take the record out", key=key, value=answer
            )
        if not messages:
            raise _starts_with_output(key, answer)
        tokens, mask = tokenizer.encode_chat([*messages, *answer], self.chat_template)
        follows = isinstance(answer[0], Mapping) and answer[0].get("role") == "assistant"
        if follows:
            before = len(tokenizer.encode_chat_prompt(messages, self.chat_template))
        else:  # more turns of a user come first
            before = len(tokenizer.encode_chat(messages, self.chat_template)[0])
        return tokens, [0] * before + mask[before:]


def _placed(record: Record, encode: Callable[[], _T]) -> _T:
    """Encode, and prefix errors with the record's location."""
    try:
        return encode()
    except DataError as problem:
        raise problem.within(record.where) from problem.__cause__


def _document(encoded: Encoded) -> Document:
    tokens, mask = encoded
    action_mask = np.asarray(mask, dtype=np.uint8)
    action_mask[:1] = 0
    return Document(np.asarray(tokens, dtype=np.int32), action_mask)


def _continued(prompt: list[int], text: str, tokenizer: Tokenizer) -> Encoded:
    response = [*tokenizer.encode(text), tokenizer.eos_id]
    return prompt + response, [0] * len(prompt) + [1] * len(response)


def _differing(chosen: Document, rejected: Document, keys: Sequence[str]) -> tuple[Document, Document]:
    """Return two documents, or refuse them if they are equal, as after a template that strips spaces."""
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise DataError(
            f"{keys[0]!r} and {keys[1]!r} have the same tokens: give two responses, or take the record out", key=keys[0]
        )
    return chosen, rejected


def _require_response(text: str, key: str) -> None:
    if not text:
        raise DataError(f"the response under {key!r} is empty: write one, or take the record out", key=key, value=text)


def _transcripts(
    texts: Sequence[str], keys: Sequence[str], prompt_key: str, tokenizer: Tokenizer
) -> tuple[Document, Document]:
    """Return two texts as documents, whose prompt is the tokens that both begin with."""
    both = [tokenizer.encode_prompt(text) for text in texts]
    alike = len(list(takewhile(lambda tokens: tokens[0] == tokens[1], zip(*both, strict=False))))
    if alike <= len(tokenizer.encode_prompt("")):  # nothing, or the token that begins every text
        raise DataError(
            f"has no prompt under {prompt_key!r}, and {keys[0]!r} and {keys[1]!r} have no common beginning that "
            "could be one: add a prompt",
            key=prompt_key,
            value=None,
        )
    for key, tokens in zip(keys, both, strict=True):
        if len(tokens) == alike:
            raise DataError(
                f"{key!r} is the beginning of the other response, so that its own is empty: write one, or take the "
                "record out",
                key=key,
                value=tokens,
            )
    chosen, rejected = (
        _document(([*tokens, tokenizer.eos_id], [0] * alike + [1] * (len(tokens) + 1 - alike))) for tokens in both
    )
    return chosen, rejected


def _turns(sample: Any, key: str, tokenizer: Tokenizer) -> Encoded:
    if isinstance(sample, str):
        tokens = [*tokenizer.encode_prompt(encodable(sample, key)), tokenizer.eos_id]
        return tokens, [0] + [1] * (len(tokens) - 1)
    if not isinstance(sample, list | tuple) or not all(isinstance(turn, str) for turn in sample):
        raise DataError(
            f"holds {'nothing' if sample is None else _kind(sample)} under {key!r}: give a text, [prompt, output] or a "
            "longer list of texts in turn",
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


def _starts_with_output(key: str, sample: Any) -> DataError:
    return DataError(
        f"{key!r} starts with an output, which nothing comes before: put a prompt first", key=key, value=sample
    )


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _keys(record: Record) -> str:
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
