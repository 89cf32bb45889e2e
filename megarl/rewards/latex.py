r"""Answers as mathematics writes them: finds \boxed{...}, brings texts into one form, and reads numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}(?=[{\s\d])")
_LONGEST = 4000
_MAX_BOXES = 20
"""Boxes that are looked at, from the last one back, for one that is closed."""

_FONTS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox)\s*\{([^{}]*)\}")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad|\s)|~|\\\$|\$|\s")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)(\d)|\{([^{}]*)\}(\d)|(\d)\{([^{}]*)\})")
_NAMED = re.compile(r"^[A-Za-z](?:\([A-Za-z]\))?=(?!=)")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>\d+)?\\frac\{{(?P<top>[-+]?{_DECIMAL})\}}\{{(?P<bottom>[-+]?{_DECIMAL})\}}"
    rf"|(?P<left>{_DECIMAL})/(?P<right>{_DECIMAL})"
    rf"|(?P<plain>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d{{1,3}})|(?:\\times|\\cdot|\*)10\^\{{?(?P<power>[-+]?\d{{1,3}})\}}?)?"
    r")(?P<percent>\\?%)?"
)


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete \boxed{...} holds, with nested braces; None if there is none."""
    for start in [match.end() for match in _BOX.finditer(text)][: -_MAX_BOXES - 1 : -1]:
        if text[start : start + 1] != "{":  # \boxed 5
            word = re.match(r"\s*([-+]?[\d.,/]+)", text[start:])
            if word:
                return word[1].rstrip(".,")
            continue
        depth = 0
        for index in range(start, min(len(text), start + _LONGEST)):
            escaped = index > 0 and text[index - 1] == "\\" and text[max(0, index - 2) : index] != "\\\\"
            if text[index] in "{}" and not escaped:
                depth += 1 if text[index] == "{" else -1
                if depth == 0:
                    return text[start + 1 : index]
    return None


def normal_text(text: str, units: Sequence[str] = ()) -> str:
    """Return an answer without white space, font commands and units, with fractions and signs in one form."""
    text = text[:_LONGEST].replace("\u2212", "-").strip().rstrip(".")
    while (plain := _FONTS.sub(r"\1", text)) != text:
        text = plain
    text = _DROPPED.sub("", re.sub(r"\\[dtc]frac", r"\\frac", text))
    text = _SHORT_FRACTION.sub(
        lambda m: rf"\frac{{{m[1] or m[3] or m[5] or ''}}}{{{m[2] or m[4] or m[6] or ''}}}", text
    )
    text = _THOUSANDS.sub(lambda m: m[0].replace("{,}", "").replace(",", ""), text)
    text = _NAMED.sub("", text)
    for unit in sorted((_DROPPED.sub("", unit) for unit in units), key=len, reverse=True):
        if unit and text.endswith(unit) and len(text) > len(unit):
            return text.removesuffix(unit)
    return text


def number_in(text: str) -> Fraction | None:
    """Return the number that a normal text is, or None if it is none."""
    found = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        return None
    if found["top"] is not None:
        bottom = Fraction(found["bottom"])
        value = None if bottom == 0 else Fraction(found["whole"] or 0) + Fraction(found["top"]) / bottom
    elif found["left"] is not None:
        right = Fraction(found["right"])
        value = None if right == 0 else Fraction(found["left"]) / right
    else:
        value = Fraction(found["plain"]) * Fraction(10) ** int(found["exponent"] or found["power"] or 0)
    if value is None:
        return None
    return (-value if found["sign"] == "-" else value) / (100 if found["percent"] else 1)
