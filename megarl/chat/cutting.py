"""Tokenise rendered text with boundaries where generation begins: a policy sees only the tokens of its prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

Anchor = tuple[int, int]
"""A character index and the index of the token that starts there. Earlier tokens do not depend on later text."""
Encode = Callable[[str, bool], tuple[list[int], list[Anchor]]]


def encode_cut(encode: Encode, text: str, cuts: Sequence[int], continued: bool = False) -> tuple[list[int], list[int]]:
    """Return the token ids of a text, and the number of tokens before each cut.

    The text before a cut has the ids that it has alone: where a token would cross the cut, or was chosen because of
    what follows, the text is encoded in two pieces.

    Args:
        encode: function that returns the token ids of a text and its anchors, of which the first is (0, 0). Its second
            argument says whether other text precedes.
        cuts: indices of characters, in ascending order.
        continued: whether other text precedes this one.
    """
    settled: list[int] = []  # ids of the text before `origin`
    places: list[int] = []
    origin = 0
    ids, anchors = encode(text, continued)
    for cut in cuts:
        start, index = anchors[bisect_right(anchors, (cut - origin, 0)) - 1]
        piece = text[origin + start : cut]
        left = encode(piece, continued and start == 0)[0] if piece else []
        places.append(len(settled) + index + len(left))
        if ids[index : index + len(left)] != left:
            settled += ids[:index] + left
            origin, continued = cut, True
            ids, anchors = encode(text[cut:], True)
    return settled + ids, places
