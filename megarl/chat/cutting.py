"""Rendered text to token ids, cut where generation begins: a policy continues from the tokens of its prompt alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

Anchor = tuple[int, int]
"""A character of a text and the index of the token that starts there. No token before depends on what follows it."""
Encode = Callable[[str, bool], tuple[list[int], list[Anchor]]]


def encode_cut(encode: Encode, text: str, cuts: Sequence[int], continued: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a text, and how many of them come before each of some characters.

    What comes before a cut has the ids that it has alone: where a token would lie across the cut, or was chosen for
    what follows it, the text is encoded in two.

    Args:
        encode: token ids of a text, and its anchors, of which the first is (0, 0). Its second argument says whether
            other text comes before.
        cuts: indices of characters, in rising order.
        continued: whether other text comes before this one.
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
