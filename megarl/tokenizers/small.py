"""Tokenizers without a file: bytes, and the characters of an alphabet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from megarl.errors import DataError
from megarl.tokenizers.base import Tokenizer, digest, write_marker
from megarl.tokenizers.published import unusable

ALPHABET_FILE = "alphabet.txt"


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, followed by padding, EOS and the markers of a chat."""

    kind = "bytes"
    _SPECIAL: ClassVar[dict[str, int]] = {
        text: 256 + index
        for index, text in enumerate(("<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))
    }

    def __init__(self) -> None:
        self.size = 256 + len(self._SPECIAL)
        self.pad_id = self._SPECIAL["<|pad|>"]
        self.eos_id = self._SPECIAL["<|eos|>"]

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text."""
        # A lone surrogate (JSON may hold one) has no UTF-8 form; it becomes "?" rather than a crash.
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the bytes among the ids."""
        return bytes(int(token) for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the marker file; there is nothing else to keep."""
        write_marker(folder, self)

    def fingerprint(self) -> str:
        """Return a hash of the special tokens."""
        return digest([self.kind, self._SPECIAL])

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return the ids of padding, EOS and the markers of a chat."""
        return dict(self._SPECIAL)

    def _marker(self, name: str) -> list[int]:
        return [self._SPECIAL[f"<|{name}|>"]]


class CharacterTokenizer(Tokenizer):
    """One id per character of an alphabet, then padding and EOS: for small formal tasks."""

    kind = "characters"

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise unusable(alphabet, ": give the alphabet, each character once")
        self.alphabet = alphabet
        self.ids = {character: index for index, character in enumerate(alphabet)}
        self.pad_id, self.eos_id = len(alphabet), len(alphabet) + 1
        self.size = len(alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """Return the index of each character; a character outside the alphabet is refused."""
        unknown = next((character for character in text if character not in self.ids), None)
        if unknown is not None:
            raise DataError(
                f"{text[:40]!r} holds {unknown!r}, which is not in tokenizer.path={self.alphabet}: add it, or take it "
                "out of the text",
                key="tokenizer.path",
                value=self.alphabet,
            )
        return [self.ids[character] for character in text]

    def _encode_continued(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the characters; other ids are left out."""
        return "".join(self.alphabet[token] for token in ids if 0 <= token < len(self.alphabet))

    def save(self, folder: str | Path) -> None:
        """Write the alphabet."""
        write_marker(folder, self)
        (Path(folder) / ALPHABET_FILE).write_text(self.alphabet, encoding="utf-8")

    def fingerprint(self) -> str:
        """Return a hash of the alphabet."""
        return digest([self.kind, self.alphabet])

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return the ids of padding and EOS."""
        return {"<|pad|>": self.pad_id, "<|eos|>": self.eos_id}
