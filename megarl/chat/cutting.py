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
    ids, anchors = encode(text, continued)
    places: list[int] = []
    for number, cut in enumerate(cuts):
        start, index = anchors[bisect_right(anchors, (cut, 0)) - 1]
        left = encode(text[start:cut], continued and start == 0)[0] if cut > start else []
        places.append(index + len(left))
        if ids[index : places[-1]] != left:
            rest, further = encode_cut(encode, text[cut:], [later - cut for later in cuts[number + 1 :]], True)
            return ids[:index] + left + rest, [*places, *(places[-1] + place for place in further)]
    return ids, places
