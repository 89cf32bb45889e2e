"""What a reward model reads of a prompt and a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarl.errors import DataError
from megarl.models.exchange.source import Source
from megarl.tokenizers import Tokenizer, build_tokenizer

KEY = "reward.model"


class RewardReader:
    """The tokens that a reward model reads: a prompt, and a response that ends with EOS as in its training.

    Attributes:
        tokenizer: its tokenizer.
        longest: its context, in tokens.
        fingerprint: identifier of how it reads.
    """

    def __init__(self, source: Source, default: Tokenizer) -> None:
        """`default` is the tokenizer of a model that has none of its own."""
        self.tokenizer = default if source.tokenizer is None else build_tokenizer(*source.tokenizer)
        self.template = source.chat_template
        self.longest = source.model.max_positions
        ids = source.token_ids
        # Transformers reads a score at the last token that is not padding: where EOS is the padding, before it.
        self.reads_eos = source.kind != "huggingface" or ids.get("pad_token_id") != ids.get("eos_token_id")
        self.fingerprint = f"{self.tokenizer.fingerprint()} {self.template!r} {self.reads_eos}"

    def of_text(self, prompt: str, output: str, where: str) -> list[int]:
        """Return the tokens of a text with a response to it; `where` is what messages call the prompt."""
        response = [*self.tokenizer.encode(output), self.tokenizer.eos_id]
        return self.fitting([*self.tokenizer.encode_prompt(prompt), *response], where)

    def of_messages(self, messages: Sequence[Any], output: str, where: str) -> list[int]:
        """Return the tokens of a conversation with a response to it, in the reward model's own chat template."""
        turns = [*messages, {"role": "assistant", "content": output}]
        return self.fitting(self.tokenizer.encode_chat(turns, self.template)[0], where)

    def fitting(self, tokens: list[int], where: str) -> list[int]:
        """Return the tokens without an EOS that is not read, or for which the context has no place; refuse more."""
        if tokens[-1] == self.tokenizer.eos_id and (not self.reads_eos or len(tokens) == self.longest + 1):
            tokens = tokens[:-1]
        if len(tokens) > self.longest:
            raise DataError(
                f"{where}: prompt and response have {len(tokens)} tokens of the reward model, whose context has "
                f"{self.longest}: shorten them, or use another reward model",
                key=KEY,
                value=len(tokens),
                where=where,
            )
        return tokens
