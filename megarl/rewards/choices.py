"""Finds the choice that a response to a multiple-choice question states."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megarl.rewards.latex import last_boxed, normal_text

_WITHOUT_CHOICES = 10
"""Letters that can be meant where the choices are not given: A to J."""

_LONGEST = 8000
"""Characters of the end of a response that are read. All repetitions below are bounded, so that the time grows with the
length alone."""

_TAG = re.compile(r"</?[A-Za-z_]{1,20}>")
_OPEN, _CLOSE = r"[\s*_$(\[{\"'`]{0,8}", r"(?![A-Za-z])"
_WRAPPED = r"(?:\\(?:text|textbf|mathrm|mathbf|boxed)\s{0,2}\{\s{0,2})?"
_STATED = re.compile(
    r"(?:answer|choice|option|solution|choose|chose|select|pick)(?:\s{1,3}(?:letter|option|choice))?"
    r"(?:\s{1,3}(?:is|was|would be|must be|should be|to be))?"
    r"(?:\s{1,3}(?:therefore|thus|then|clearly|option|choice|letter|answer)){0,3}[\s:=*_-]{0,8}"
    rf"{_OPEN}{_WRAPPED}{_OPEN}(?P<letter>[A-Za-z]){_CLOSE}",
    re.IGNORECASE,
)
_CORRECT = re.compile(
    rf"{_OPEN}(?<![A-Za-z'\u2019])(?P<letter>[A-Z])"
    rf"[\s*_$)\]}}\"'`.:]{{0,8}}\sis\s(?:the\s)?(?:correct|right|best|answer)"
)
_ALONE = re.compile(r"^[ *_$(\[#>-]{0,12}(?P<letter>[A-Za-z])[ *_$)\].:,!]{0,12}$", re.MULTILINE)
_LEADING = re.compile(r"^[ *_$]{0,8}(?:\((?P<first>[A-Z])\)|(?P<letter>[A-Z])[ *_]{0,4}[.):])[*_]{0,4}\s", re.MULTILINE)
_MARKED = re.compile(r"\*\*\s?\(?(?P<bold>[A-Z])[).:]?\s?\*\*|\((?P<letter>[A-Z])\)|\[(?P<bracket>[A-Z])\]")
_DIGIT = re.compile(
    r"(?<![\w.,%/+=^\\-])\d(?![\w-]|[.,]\d|\s*[%/+=^]|\s*\*+\s*\d"
    r"|[ \t]+(?!(?:because|since|as|and|is)\b)[a-z])"
)
"""A digit that may name a choice: no part of a longer number, a formula, or an amount such as "2 apples"."""
_LAST_WORD = re.compile(r"(?<![A-Za-z])(?P<letter>[A-Z])[\s*_$)\].!\"'`]{0,12}\Z")


def chosen_letter(text: str, choices: Sequence[str] = (), labels: Sequence[str] = ()) -> str | None:
    """Return the letter, from A, of the choice that a response states last; None if it states none.

    What counts more decides: a box or a statement ("the answer is B"), then a letter that stands alone or is marked,
    then the text of exactly one choice.

    Args:
        text: the response.
        choices: texts of the choices.
        labels: labels of the choices. Digits among them may take the place of letters in a box, in a statement and
            alone in a line, unless the text of a choice has a digit: then it could be meant.
    """
    letters = {chr(ord("A") + index) for index in range(len(choices) or _WITHOUT_CHOICES)}
    text = _TAG.sub("\n", text[-_LONGEST:]).strip()
    lettered = _with_letters(text, choices, labels)
    stated = [*_letters_in(lettered, letters, _STATED, _CORRECT), *_boxes(lettered, letters, choices)]
    if stated:
        return max(stated)[1]
    marked = [*_letters_in(lettered, letters, _ALONE), *_letters_in(text, letters, _MARKED, _LAST_WORD)]
    leading = _letters_in(text, letters, _LEADING)
    if marked or leading:
        many = {letter for _, letter in leading}
        last = max([*marked, *(leading if len(many) == 1 or not marked else [])])
        copied = len(many) > 1 and len(many) == len(choices)  # the question's own list
        return None if copied and not marked else last[1]
    return _by_text(text, choices)


def _with_letters(text: str, choices: Sequence[str], labels: Sequence[str]) -> str:
    """Return a response with the letter of a choice in place of each digit that is its label."""
    letter_of = {label: chr(ord("A") + index) for index, label in enumerate(labels)}
    if any(character.isdigit() for choice in choices for character in choice):
        return text
    return _DIGIT.sub(lambda match: letter_of.get(match[0], match[0]), text)


def _letters_in(text: str, letters: set[str], *patterns: re.Pattern[str]) -> list[tuple[int, str]]:
    """Return where, and which, letters are found. A small letter is a word of the sentence unless the line ends there
    or a mark follows: "the answer is a bit"."""
    found = []
    for pattern in patterns:
        for match in pattern.finditer(text):
            name = next(name for name, letter in match.groupdict().items() if letter)
            letter, rest = match[name], text[match.end(name) :]
            if letter.islower() and not re.match(r"[*_$)\]}\"'`.:,!]|\s*$|\s*\n", rest):
                continue
            if letter.upper() == "I" and re.match(r"\s+[a-z]", rest):
                continue
            if (
                letter == "A"
                and re.match(r"\s+[a-z]+\b(?<!because)(?<!since)(?<!as)(?<!and)", rest)
                and pattern is _STATED
            ):
                continue
            if letter.upper() in letters:
                found.append((match.start(name), letter.upper()))
    return found


def _boxes(text: str, letters: set[str], choices: Sequence[str]) -> list[tuple[int, str]]:
    box = last_boxed(text)
    if box is None:
        return []
    inside = normal_text(box).strip("().:*")
    position = text.rfind(box)
    for number, choice in enumerate(choices):
        if normal_text(choice).casefold() == normal_text(box).casefold():
            return [(position, chr(ord("A") + number))]
    letter = inside[:1].upper()
    alone = len(inside) == 1 or (len(inside) > 1 and inside[1] in ").:")
    return [(position, letter)] if letter in letters and alone else []


def _by_text(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice whose text is in the response, or of the one that is found last at its
    end."""
    plain = " ".join(text.casefold().split()).rstrip(".!* ")
    positions = {}
    for number, choice in enumerate(choices):
        wanted = " ".join(choice.casefold().split()).rstrip(".")
        if wanted:
            hits = [m.end() for m in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", plain)]
            if hits:
                positions[chr(ord("A") + number)] = (hits[-1], len(wanted))
    if not positions:
        return None
    ordered = sorted(positions, key=lambda letter: positions[letter])
    if len(ordered) == 1 or positions[ordered[-1]][0] == len(plain):
        return ordered[-1]
    return None
