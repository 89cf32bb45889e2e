"""Tokenizers of Hugging Face folders and hub names. The library is imported when a tokenizer is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.chat.cutting import Anchor
from megarl.errors import first_line
from megarl.tokenizers.base import Tokenizer, digest, write_marker
from megarl.tokenizers.published import encoding, load_published, published_state, unusable

_SENTINEL = re.compile(r"<extra_id_\d+>")
MOST_TOKENS = 2**24
"""Entries of a vocabulary. A larger id is damage, and work that grows with it would take for ever."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of a Hugging Face folder or hub name, with its own chat template where it has one."""

    kind = "huggingface"

    def __init__(self, path: str) -> None:
        self._tokenizer = load_published(path)
        own = self._tokenizer
        if own.eos_token_id is None:
            raise unusable(path, " has no EOS, so no response could end; set eos_token in its tokenizer_config.json")
        vocabulary = own.get_vocab()
        # A vocabulary may have holes, so its largest id can be past the number of its entries.
        self.size = max(len(own), *(token + 1 for token in vocabulary.values()))
        if self.size > MOST_TOKENS:
            raise unusable(
                path,
                f" has the id {self.size - 1}, and no vocabulary has more than {MOST_TOKENS} "
                "entries: restore its tokenizer.json",
            )
        self.eos_id = int(own.eos_token_id)
        self.pad_id = int(own.pad_token_id) if own.pad_token_id is not None else self.eos_id
        self.bos_id = int(own.bos_token_id) if own.bos_token_id is not None else None
        opening = own("a", verbose=False)["input_ids"][:1]
        self.adds_bos = self.bos_id is not None and opening == [self.bos_id]
        self._special = {
            str(token.content): int(index) for index, token in own.added_tokens_decoder.items() if token.special
        }
        named = {text: own.convert_tokens_to_ids(text) for text in own.all_special_tokens}
        self._special |= {text: int(token) for text, token in named.items() if token is not None}
        self._added = {str(token.content): int(index) for index, token in own.added_tokens_decoder.items()}
        # The unknown token also stands for characters within a word, whose ids depend on what is around them.
        self._added_ids = frozenset(self._added.values()) - {own.unk_token_id}
        self._has_sentinels = any(_SENTINEL.fullmatch(text) for text in self._special)
        self._left_out = frozenset(token for text, token in self._special.items() if not _SENTINEL.fullmatch(text))
        self._fingerprint = digest([self.kind, *published_state(own, vocabulary)])

    def encode(self, text: str) -> list[int]:
        """Return the ids, without special tokens around them."""
        with encoding(self._tokenizer.name_or_path, text):
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; special tokens are left out, but not T5's sentinels, which mark the spans of a text."""
        kept = [int(token) for token in ids if 0 <= token < self.size]
        if self._has_sentinels:
            kept = [token for token in kept if token not in self._left_out]
        return str(
            self._tokenizer.decode(
                kept, skip_special_tokens=not self._has_sentinels, clean_up_tokenization_spaces=False
            )
        )

    def _own_template(self) -> str | None:
        own = self._tokenizer
        try:
            return str(own.get_chat_template()) if own.chat_template else None
        except ValueError as error:  # several templates, of which none is the default
            raise unusable(own.name_or_path, f": {first_line(error, kind=True)}; set data.chat_template") from error

    @property
    def _structural(self) -> Mapping[str, int]:
        return self._added

    def _written(self) -> dict[str, Any]:
        return {"bos_token": "", "eos_token": ""} | dict(self._tokenizer.special_tokens_map)

    def _encode_anchored(self, text: str, continued: bool) -> tuple[list[int], list[Anchor]]:
        own = self._tokenizer
        if continued:
            # After a line feed, whose tokens are left out again: a tokenizer may put a space before a text.
            newline = self.encode("\n")
            ids, anchors = self._encode_anchored("\n" + text, False)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :], [(0, 0), *((at - 1, place - len(newline)) for at, place in anchors[1:])]
        if not own.is_fast:
            return self.encode(text), [(0, 0)]
        with encoding(own.name_or_path, text):
            encoded = own(
                text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
        ids, structural = encoded["input_ids"], self._added_ids
        offsets = encoded["offset_mapping"]
        places = [place for place, token in enumerate(ids) if token in structural]
        return ids, [(0, 0), *((offsets[place][0], place) for place in places)]

    def save(self, folder: str | Path) -> None:
        """Write the library's own files."""
        write_marker(folder, self)
        self._tokenizer.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary and of what else decides the ids."""
        return self._fingerprint

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return the special tokens, and the added tokens marked as special."""
        return dict(self._special)
