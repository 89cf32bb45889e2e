"""The text of a response while its tokens arrive: characters are shown once no later token can change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What decoders return for bytes that are no character, such as the first bytes of one."""
_LONGEST, _OVERLAP = 256, 64
"""Tokens that are decoded at a time, and how many of them are decoded again in the next window."""


class StreamedText:
    """Decodes tokens as they arrive.

    A token may hold a part of a character, and its text may depend on the tokens before it (SentencePiece drops the
    space in front of a text). So each token is decoded with those before it, and only the text that this adds is
    returned. Text that ends in an incomplete character is held back.

        tokens      e4      b8      ad     21
        decoded     ?       ?       中     中!
        returned                    中       !
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = ""  # the text of the window that was returned

    def add(self, token: int) -> str:
        """Return the text that is complete with one more token; often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        new = self._new(text.rstrip(UNFINISHED))
        if len(self._window) >= _LONGEST and self._shown == text:
            kept = self._window[-_OVERLAP:]
            context = self._decode(kept)
            if text.endswith(context.lstrip(UNFINISHED).lstrip()):  # not so where the window would split a character
                self._window, self._shown = kept, context
        return new

    def end(self) -> str:
        """Return the text that was held back, once the last token has arrived."""
        return self._decode(self._window)[len(self._shown) :]

    def _new(self, text: str) -> str:
        if not text.startswith(self._shown):  # a run of bytes that is a character again only with later tokens
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new
