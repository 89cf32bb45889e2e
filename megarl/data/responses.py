"""Convert a record to responses, each preceded by its prompt: pairs, labelled, ranked and scored ones, steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any, NamedTuple

import numpy as np

from megarl.data.formats import (
    INSTRUCTION,
    Document,
    Encoded,
    RecordFormat,
    as_document,
    continued,
    encodable,
    keys_of,
    kind_of,
    placed,
    starts_with_output,
)
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import Tokenizer

LARGEST = 1e18
"""Maximum magnitude of scores, labels and margins: training computes their squares in float32."""


class Ranked(NamedTuple):
    """Responses to one prompt and how good each is, higher is better. Responses of one level are not compared.

    Levels are 0, 1, 2 ... in the order of the record's ranks or scores: the data hold them as float32, in which numbers
    that are large or close to each other would be equal.

    `margin` is by how much a better response should lead.
    """

    documents: tuple[Document, ...]
    levels: tuple[int, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class ResponseFormat(RecordFormat):
    """How records of responses are read; the fields are the keys of the same name under `data`."""

    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    label_key: str = "label"
    margin_key: str = "margin"
    responses_key: str = "responses"
    ranks_key: str = "ranks"
    scores_key: str = "scores"
    score_key: str = "score"
    steps_key: str = "steps"
    labels_key: str = "labels"
    step_separator: str = "\n"

    # --- what a record can be read as -------------------------------------------------------------------------------

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
                elif self._has_prompt_text(record):
                    prompt = self._prompt(record, tokenizer)
                    chosen, rejected = (as_document(continued(prompt, text, tokenizer)) for text in texts)
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
                found = " and ".join(f"{kind_of(one)} under {key!r}" for one, key in zip(both, keys, strict=True))
                raise DataError(
                    f"holds {found}: give two texts, or two lists of messages{self._setting(keys[wrong])}",
                    key=keys[wrong],
                    value=both[wrong],
                )
            chosen, rejected = (
                as_document(self._answer(messages, answer, key, tokenizer))
                for key, answer in zip(keys, answers, strict=True)
            )
            return _differing(chosen, rejected, keys)

        return placed(record, encode)

    def labelled(self, record: Record, tokenizer: Tokenizer) -> list[tuple[Document, bool]]:
        """Return responses, each preceded by its prompt, and whether it is desirable: one, or the two of a pair."""
        if record.fields.get(self.completion_key) is None and record.fields.get(self.chosen_key) is not None:
            chosen, rejected = self.pair(record, tokenizer)
            return [(chosen, True), (rejected, False)]

        def encode() -> tuple[Document, bool]:
            key, label = self._completion_key(record), record.fields.get(self.label_key)
            if isinstance(label, np.bool_ | np.integer):
                label = label.item()
            if not isinstance(label, bool | int) or label not in (0, 1):
                raise DataError(
                    f"key {self.label_key!r} holds {kind_of(label) if label is None else repr(label)}; expected true "
                    f"or false (found keys: {keys_of(record)}); fix the record{self._setting(self.label_key)}",
                    key=self.label_key,
                    value=label,
                )
            return self._response(record, record.fields.get(key), key, tokenizer), bool(label)

        return [placed(record, encode)]

    def ranked(self, record: Record, tokenizer: Tokenizer) -> Ranked:
        """Return the responses of a list, or the two of a pair, with their levels.

        A list has ranks, of which 1 is the best, or scores, or neither if the best response comes first.
        """
        if record.fields.get(self.responses_key) is None:
            documents = self.pair(record, tokenizer)
            return Ranked(documents, (1, 0), placed(record, lambda: self._margin(record)))

        def encode() -> Ranked:
            key = self.responses_key
            responses = self._responses(record)
            given = [name for name in (self.ranks_key, self.scores_key) if record.fields.get(name) is not None]
            levels = tuple(reversed(range(len(responses))))
            if given:
                levels, *others = (self._levels(record, name, len(responses)) for name in given)
                if others and _disagree(levels, *others):
                    raise DataError(
                        f"{given[0]!r} and {given[1]!r} order the responses differently (1 is the best rank, and a "
                        f"higher score is better): take one out{self._setting(given[1])}",
                        key=given[0],
                        value=record.fields[given[0]],
                    )
            if len(set(levels)) == 1:
                raise DataError(
                    f"{given[0]!r} ties all {len(levels)} responses, so that none is better: rank them, or take the "
                    "record out",
                    key=given[0],
                    value=record.fields[given[0]],
                )
            documents = tuple(self._response(record, response, key, tokenizer) for response in responses)
            by_tokens: dict[bytes, int] = {}
            for document, level in zip(documents, levels, strict=True):
                if by_tokens.setdefault(document.tokens.tobytes(), level) != level:
                    raise DataError(
                        f"{key!r} has two responses with the same tokens and different ranks: take one out",
                        key=key,
                        value=responses,
                    )
            return Ranked(documents, levels, self._margin(record))

        return placed(record, encode)

    def scored(self, record: Record, tokenizer: Tokenizer) -> list[tuple[Document, float]]:
        """Return the response with its score, or the responses of a list with theirs."""

        def encode() -> list[tuple[Document, float]]:
            if record.fields.get(self.responses_key) is None:
                key = self._completion_key(record)
                document = self._response(record, record.fields.get(key), key, tokenizer)
                return [(document, self._number(record.fields.get(self.score_key), self.score_key, record))]
            responses = self._responses(record, least=1)
            scores = self._numbers(record, self.scores_key, len(responses))
            documents = [self._response(record, response, self.responses_key, tokenizer) for response in responses]
            return list(zip(documents, scores, strict=True))

        return placed(record, encode)

    def steps(
        self, record: Record, tokenizer: Tokenizer, *, probabilities: bool = True
    ) -> tuple[Document, tuple[float, ...], int]:
        """Return the steps of a response as one sequence, of which the last token of each step is marked, the steps'
        scores, and the number of tokens of the prompt.

        Each step but the last is followed by the separator, and the last by EOS, or by what ends an answer of a
        conversation. They are encoded one by one.
        With `probabilities`, scores are from 0 to 1.
        """

        def encode() -> tuple[Document, tuple[float, ...], int]:
            key, steps = self.steps_key, _as_list(record.fields.get(self.steps_key))
            if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step for step in steps):
                raise DataError(
                    f"key {key!r} holds {_list_kind(steps)}; expected a list of texts (found keys: {keys_of(record)}); "
                    f"fix the record{self._setting(key)}",
                    key=key,
                    value=steps,
                )
            labels = self._numbers(record, self.labels_key, len(steps))
            outside = [label for label in labels if probabilities and not 0 <= label <= 1]
            if outside:
                raise DataError(
                    f"key {self.labels_key!r} holds {outside[0]:g}, and the logistic loss takes numbers from 0 to 1: "
                    f"fix the record{self._setting(self.labels_key)}, or set rm.step_loss=squared",
                    key=self.labels_key,
                    value=record.fields[self.labels_key],
                    offers={"rm.step_loss": ["squared"]},
                )
            last: tuple[int, ...] = (tokenizer.eos_id,)
            if self._has_messages(record):
                tokens = tokenizer.encode_chat_prompt(self._conversation(record), self.chat_template)
                last = tokenizer.answer_end(self.chat_template)
            else:
                tokens = self._prompt(record, tokenizer)
            prompt, marks = len(tokens), [0] * len(tokens)
            for number, step in enumerate(steps, 1):
                end = tokenizer.encode(self.step_separator) if number < len(steps) else last
                added = [*tokenizer.encode(encodable(step, key, f"step {number}")), *end]
                tokens = [*tokens, *added]
                marks += [0] * (len(added) - 1) + [1]
            return as_document((tokens, marks)), labels, prompt

        return placed(record, encode)

    def is_transcript(self, record: Record) -> bool:
        """Return whether a record is a pair of texts that have no prompt of their own."""
        is_text = isinstance(record.fields.get(self.chosen_key), str)
        return is_text and not self._has_messages(record) and not self._has_prompt_text(record)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _prompt(self, record: Record, tokenizer: Tokenizer) -> list[int]:
        tokens = tokenizer.encode_prompt(self._prompt_text(record))
        if not tokens:
            key = INSTRUCTION if self.is_instruction(record) else self.prompt_key
            raise DataError(
                f"the prompt under {key!r} is empty and has no tokens: write one, or take the record out",
                key=key,
                value="",
            )
        return tokens

    def _response(self, record: Record, response: Any, key: str, tokenizer: Tokenizer) -> Document:
        """Return the prompt of a record with one response, a text or a list of messages, which alone is trained on."""
        if isinstance(response, list):
            if not self._has_messages(record):
                raise DataError(
                    f"{key!r} is a list of messages, and the prompt is not: give the prompt as messages, or the "
                    "response as text",
                    key=key,
                    value=response,
                )
            answer, prompt = self._checked_messages(record, response, key), self._conversation(record)
            if answer[: len(prompt)] == prompt:  # the list is the whole conversation
                answer = answer[len(prompt) :]
            return as_document(self._answer(prompt, answer, key, tokenizer))
        text = self._checked_text(record, response, key)
        _require_response(text, key)
        if self._has_messages(record):
            answer = [{"role": "assistant", "content": text}]
            return as_document(self._answer(self._conversation(record), answer, key, tokenizer))
        return as_document(continued(self._prompt(record, tokenizer), text, tokenizer))

    def _responses(self, record: Record, least: int = 2) -> list[Any]:
        key, responses = self.responses_key, _as_list(record.fields[self.responses_key])
        if not isinstance(responses, list) or len(responses) < least:
            found = f"{len(responses)} response" if isinstance(responses, list) and responses else kind_of(responses)
            raise DataError(
                f"key {key!r} holds {found}; expected a list of {least} or more (found keys: {keys_of(record)}); fix "
                f"the record{self._setting(key)}",
                key=key,
                value=responses,
            )
        return responses

    def _levels(self, record: Record, key: str, count: int) -> tuple[int, ...]:
        """Return how good each response is by its rank or its score: 0 for the worst, one more for each better one."""
        if key == self.ranks_key:
            return _ordered([-rank for rank in self._numbers(record, key, count, truth=False, largest=math.inf)])
        return _ordered(self._numbers(record, key, count, largest=math.inf))

    def _numbers(
        self, record: Record, key: str, count: int, *, truth: bool = True, largest: float = LARGEST
    ) -> tuple[float, ...]:
        """Return a list of as many numbers as there are responses or steps; the others are as in `_number`."""
        values = _as_list(record.fields.get(key))
        if not isinstance(values, list) or len(values) != count:
            found = f"{len(values)} values" if isinstance(values, list) else kind_of(values)
            raise DataError(
                f"key {key!r} holds {found}; expected a list of {count} numbers, one for each (found keys: "
                f"{keys_of(record)}); fix the record{self._setting(key)}",
                key=key,
                value=values,
            )
        return tuple(self._number(value, key, record, truth=truth, largest=largest) for value in values)

    def _number(self, value: Any, key: str, record: Record, *, truth: bool = True, largest: float = LARGEST) -> float:
        """Return a value as a number of at most this magnitude; `truth` allows true for 1 and false for 0."""
        if isinstance(value, np.generic):
            value = value.item()
        if not _is_number(value) or (isinstance(value, bool) and not truth):
            raise DataError(
                f"key {key!r} holds {kind_of(value) if value is None else repr(value)}; expected a number (found keys: "
                f"{keys_of(record)}); fix the record{self._setting(key)}",
                key=key,
                value=value,
            )
        if abs(float(value)) > largest:
            raise DataError(
                f"key {key!r} holds {float(value):g}; expected a number of at most {largest:g} in magnitude: scale the "
                f"numbers of all records, or fix the record{self._setting(key)}",
                key=key,
                value=value,
            )
        return float(value)

    def _margin(self, record: Record) -> float:
        value = record.fields.get(self.margin_key)
        return 0.0 if value is None else self._number(value, self.margin_key, record, truth=False)

    def _answer(self, messages: list[Any], answer: list[Any], key: str, tokenizer: Tokenizer) -> Encoded:
        """The conversation up to the end of its answer, which alone is trained on."""
        if not answer or not isinstance(answer[-1], Mapping) or answer[-1].get("role") != "assistant":
            raise DataError(f"{key!r} ends with no answer of the assistant's own: give it one", key=key, value=answer)
        if not answer[-1].get("content"):
            raise DataError(
                f"the response under {key!r} is empty: write one, or take the record out", key=key, value=answer
            )
        if not messages:
            raise starts_with_output(key, answer)
        tokens, mask = tokenizer.encode_answered([*messages, *answer], self.chat_template)
        follows = isinstance(answer[0], Mapping) and answer[0].get("role") == "assistant"
        if follows:
            before = len(tokenizer.encode_chat_prompt(messages, self.chat_template))
        else:  # more turns of a user come first
            before = len(tokenizer.encode_chat(messages, self.chat_template)[0])
        return tokens, [0] * len(mask[:before]) + mask[before:]


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
    both = [tokenizer.encode_opening(text) for text in texts]
    alike = len(list(takewhile(lambda tokens: tokens[0] == tokens[1], zip(*both, strict=False))))
    if alike <= len(tokenizer.encode_opening("")):  # nothing, or the token that begins every text
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
    prompt = tokenizer.end_prompt(both[0][:alike])
    responses = [[*tokens[alike:], tokenizer.eos_id] for tokens in both]
    chosen, rejected = (
        as_document(([*prompt, *response], [0] * len(prompt) + [1] * len(response))) for response in responses
    )
    return chosen, rejected


def _as_list(value: Any) -> Any:
    """Return an array or a tuple as a list, and everything else as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    """Return whether a value is finite as a float."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _ordered(values: Sequence[float]) -> tuple[int, ...]:
    """Return the place of each value among the distinct values, from 0 for the smallest."""
    places = {value: place for place, value in enumerate(sorted(set(values)))}
    return tuple(places[value] for value in values)


def _disagree(levels: Sequence[int], others: Sequence[int]) -> bool:
    """Return whether any two responses have one order by the first levels and the opposite one by the others."""
    pairs = combinations(zip(levels, others, strict=True), 2)
    return any((one[0] - two[0]) * (one[1] - two[1]) < 0 for one, two in pairs)


def _list_kind(value: Any) -> str:
    return "a list with something else than texts" if isinstance(value, list) and value else kind_of(value)
