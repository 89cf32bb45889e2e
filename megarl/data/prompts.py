"""Prompts to be answered, with what else their records hold for reward functions.

They are measured when they are read, so that no later phase can find one that the model cannot answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megarl.config.files import load_chat_template
from megarl.config.sections.data import HeldOutDataConfig, SourcesConfig
from megarl.data.formats import RecordFormat
from megarl.data.sources import Places, Record, read_records
from megarl.errors import ConfigError, DataError
from megarl.logging import get_logger
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and tokens.

    Attributes:
        text: the whole text of the record, also where tokens were cut off.
        metadata: the record's other fields.
        where: `file:line` of the record, for messages.
        number: index of the record among all that were read; prompts that are left out leave gaps.
        messages: the conversation, where the prompt is one.
        source: index of the entry of data.train that it comes from.
    """

    text: str
    tokens: tuple[int, ...]
    metadata: dict[str, Any]
    where: str = field(default="", compare=False)
    number: int = field(default=0, compare=False)
    messages: tuple[Any, ...] = field(default=(), compare=False)
    source: int = field(default=0, compare=False)


@dataclass(frozen=True)
class PromptLimits:
    """What a model can answer: prompts of its vocabulary that leave room for a response in its context.

    `too_long` says what happens to longer prompts: error, drop or truncate.
    """

    context: int
    max_new_tokens: int
    vocab_size: int
    too_long: str = "error"

    def __post_init__(self) -> None:
        if self.room < 1:
            raise ConfigError(
                f"rollout.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{self.context} tokens: use rollout.max_new_tokens={self.context - 1} or less",
                key="rollout.max_new_tokens",
                value=self.max_new_tokens,
                offers={"rollout.max_new_tokens": [self.context - 1]},
            )

    @property
    def room(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.context - self.max_new_tokens

    def __str__(self) -> str:
        return (
            f"{self.room} tokens (the model's context of {self.context} less rollout.max_new_tokens="
            f"{self.max_new_tokens})"
        )


def read_prompts(
    paths: Sequence[str],
    split: str,
    data: SourcesConfig | HeldOutDataConfig,
    tokenizer: Tokenizer,
    limits: PromptLimits,
    name: str = "data.train",
) -> list[Prompt]:
    """Return the prompt of every record, after it was compared with the limits.

    All prompts have the same metadata fields, None where a record lacks one, so that what a reward function is given
    does not depend on which prompts share a call.

    Args:
        name: the configuration key of the paths, for messages.
    """
    record_format = prompt_format(data)
    records = read_records(paths, split, data.prompt_key, name, data.options)
    encoded = (encode_prompt(record, tokenizer, record_format) for record in records)
    return _with_equal_fields(fit_prompts(encoded, limits, name))


def prompt_format(data: SourcesConfig | HeldOutDataConfig) -> RecordFormat:
    """Return how prompts are read, and samples that the policy is to answer them like: by the same keys and the same
    chat template."""
    return RecordFormat(
        prompt_key=data.prompt_key,
        messages_key=data.messages_key,
        chat_template=load_chat_template(data.chat_template),
        settable=("messages_key", "prompt_key"),
    )


def encode_prompt(record: Record, tokenizer: Tokenizer, record_format: RecordFormat) -> Prompt:
    """Return a record's prompt as text and tokens, with its other fields."""
    text, tokens = record_format.prompt(record, tokenizer)
    keys = (record_format.prompt_key, record_format.messages_key)
    others = {key: value for key, value in record.fields.items() if key not in keys}
    messages = record.fields.get(record_format.messages_key) or ()
    return Prompt(text, tuple(tokens), others, record.where, messages=tuple(messages), source=record.source)


def fit_prompts(prompts: Iterable[Prompt], limits: PromptLimits, name: str) -> list[Prompt]:
    """Return the prompts that the model can answer, numbered by their index in `prompts`.

    A prompt that is too long is refused, left out, or cut on the left; how many were is logged in one line.

    Args:
        name: what all prompts together are called in messages, such as "data.train".
    """
    fitting: list[Prompt] = []
    long = Places()
    number = -1
    for number, prompt in enumerate(prompts):
        _check_vocabulary(prompt, limits.vocab_size)
        tokens = prompt.tokens
        if len(tokens) > limits.room:
            if limits.too_long == "error":
                raise DataError(
                    f"{prompt.where}: the prompt has {len(tokens)} tokens, and there is room for {limits}: shorten it, "
                    "lower rollout.max_new_tokens, or set rollout.too_long=truncate or drop",
                    key="rollout.max_new_tokens",
                    value=limits.max_new_tokens,
                    where=prompt.where,
                    offers={"rollout.too_long": ("truncate", "drop")},
                )
            long.add(prompt.where)
            if limits.too_long == "drop":
                continue
            tokens = tokens[-limits.room :]
        fitting.append(replace(prompt, tokens=tokens, number=number))
    if long.count and not fitting:
        raise DataError(
            f"{name}: none of its {number + 1} prompts is left, as all are longer than {limits} and "
            "rollout.too_long=drop: shorten them, lower rollout.max_new_tokens, or set rollout.too_long=truncate",
            key="rollout.too_long",
            value="drop",
            where=name,
            offers={"rollout.too_long": ["truncate"]},
        )
    if long.count:
        done = "left out" if limits.too_long == "drop" else "cut on the left"
        log.warning(
            "%s: %d of %d prompts are longer than %s and were %s: %s", name, long.count, number + 1, limits, done, long
        )
    return fitting


def _check_vocabulary(prompt: Prompt, vocab_size: int) -> None:
    if min(prompt.tokens) < 0 or max(prompt.tokens) >= vocab_size:
        token = next(token for token in prompt.tokens if not 0 <= token < vocab_size)
        raise DataError(
            f"{prompt.where}: the prompt has token {token}, but the model's vocabulary has {vocab_size} entries: "
            "set tokenizer.path to the tokenizer that the model was trained with",
            key="token",
            value=token,
            where=prompt.where,
        )


def _with_equal_fields(prompts: list[Prompt]) -> list[Prompt]:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.metadata)
    return [
        prompt
        if len(prompt.metadata) == len(names)
        else replace(prompt, metadata={name: prompt.metadata.get(name) for name in names})
        for prompt in prompts
    ]
