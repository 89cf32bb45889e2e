"""What a reward model reads of a prompt and a response."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

from megarl.errors import DataError
from megarl.models.exchange.source import Source
from megarl.tokenizers import Tokenizer, build_tokenizer
from megarl.tokenizers.base import last_turn

KEY = "reward.model"


class ReadTokens(list[int]):
    """The tokens of a prompt and a response, of which the first `prompt` are those of the prompt."""

    def __init__(self, tokens: Iterable[int], prompt: int) -> None:
        super().__init__(tokens)
        self.prompt = prompt


class RewardReader:
    """The tokens that a reward model reads: a prompt, and a response with the end that it has in training.

    A text ends with EOS, and a conversation with what ends an answer in the chat template, if that writes any. An end
    for which the context has no place is left out.

    Attributes:
        tokenizer: its tokenizer.
        longest: its context, in tokens.
        fingerprint: identifier of how it reads.
    """

    def __init__(self, source: Source, default: Tokenizer, *, key: str = KEY) -> None:
        """`default` is the tokenizer of a model that has none of its own; `key` is the configuration key that names the
        model."""
        self.key = key
        self.tokenizer = copy(default) if source.tokenizer is None else build_tokenizer(*source.tokenizer)
        self.tokenizer.ends_prompts = source.model.encoder is not None
        self.template = source.chat_template
        self.longest, self.vocab_size = source.model.max_positions, source.vocab_size
        self.reads_eos = source.score_reads_eos
        self.fingerprint = f"{self.tokenizer.fingerprint()} {self.template!r} {self.reads_eos}"

    def of_text(self, prompt: str, output: str, where: str) -> ReadTokens:
        """Return the tokens of a text with a response to it; `where` is what messages call the prompt."""
        return self.of_ids(self.tokenizer.encode_prompt(prompt), self.tokenizer.encode(output), False, where)

    def of_messages(self, messages: Sequence[Any], output: str, where: str) -> ReadTokens:
        """Return the tokens of a conversation with a response to it, in the reward model's own chat template."""
        turns = [*messages, {"role": "assistant", "content": output}]
        tokens, marks = self.tokenizer.encode_answered(turns, self.template)
        ends = tokens[-1:] == [*self.tokenizer.stop_ids(self.template)[-1:]]
        start = last_turn(marks)
        return self._fitting(tokens[: len(tokens) - ends], tokens[len(tokens) - ends :], start, where)

    def of_ids(self, prompt: Sequence[int], response: Sequence[int], talks: bool, where: str) -> ReadTokens:
        """Return the tokens of a prompt and of a response without its end, encoded by a tokenizer of which `reads_ids`
        is true. `talks` says whether the prompt is a conversation."""
        end = self.tokenizer.answer_end(self.template) if talks else (self.tokenizer.eos_id,)
        return self._fitting([*prompt, *response], [*end], len(prompt), where)

    def reads_ids(self, tokenizer: Tokenizer, template: str | None, talks: bool) -> bool:
        """Return whether token ids of another tokenizer are what this reader would encode.

        Args:
            tokenizer: the other tokenizer.
            template: its chat template, None for its own.
            talks: whether prompts are conversations.
        """
        own = self.tokenizer

        def around(one: Tokenizer) -> tuple[str, bool, int | None, bool]:
            return one.fingerprint(), one.adds_bos, one.bos_id, one.ends_prompts

        if around(own) != around(tokenizer):
            return False
        if not talks:
            return True
        same = own.template_in_use(self.template) == tokenizer.template_in_use(template)
        # A response contains a part of an end at which generation does not stop at once.
        return same and own.answer_end(self.template) in ((), own.stop_ids(self.template)[-1:])

    def knows(self, tokens: Sequence[int]) -> bool:
        """Return whether all tokens are in the reward model's vocabulary."""
        return max(tokens, default=0) < self.vocab_size

    def _fitting(self, body: list[int], end: list[int], prompt: int, where: str) -> ReadTokens:
        """Return the tokens with as much of the end as is read and as the context has a place for; refuse too many."""
        if not self.reads_eos and end == [self.tokenizer.eos_id]:
            end = []
        if len(body) > self.longest:
            raise DataError(
                f"{where}: prompt and response have {len(body)} tokens of {self.key}, whose context has "
                f"{self.longest}: shorten them, or use another reward model",
                key=self.key,
                value=len(body),
                where=where,
            )
        tokens = ReadTokens([*body, *end][: self.longest], prompt)
        if not self.knows(tokens):
            raise DataError(
                f"{where}: prompt and response have the token {max(tokens)}, and the vocabulary of {self.key} has "
                f"{self.vocab_size} entries: its tokenizer belongs to another model",
                key=self.key,
                value=max(tokens),
                where=where,
            )
        return tokens
