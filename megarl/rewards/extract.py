"""The answer in the text of a response, for majority votes: ready-made readers, and functions of the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megarl.errors import RewardError
from megarl.functions.named import resolve
from megarl.rewards.builtin import last_number

KEY = "eval.vote"
_CHOICE = re.compile(r"(?<![A-Za-z0-9'])\(?([A-Z])\)?(?![A-Za-z0-9'])")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def text(response: str) -> str | None:
    """Return the whole response, with white space made equal; None if it is empty."""
    return " ".join(response.split()) or None


def number(response: str) -> str | None:
    """Return the last number in the response, in one form for equal numbers; None without a number."""
    found = last_number(response)
    return None if found is None else repr(found + 0.0)  # -0.0 + 0.0 is 0.0


def choice(response: str) -> str | None:
    """Return the last capital letter that stands alone, as in `Answer: (B)`; None without one.

    The words `I` and `A` count only where nothing else does.
    """
    found = _CHOICE.findall(response)
    letters = [letter for letter in found if letter not in "IA"] or found
    return letters[-1] if letters else None


def boxed(response: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, with white space made equal; None without a closed one."""
    for start in reversed([match.end() for match in _BOXED.finditer(response)]):
        depth = 1
        for index in range(start, len(response)):
            depth += {"{": 1, "}": -1}.get(response[index], 0)
            if depth == 0:
                return text(response[start:index])
    return None


READERS: dict[str, Callable[[str], str | None]] = {"text": text, "number": number, "choice": choice, "boxed": boxed}


def read_answers(how: str, responses: Sequence[str]) -> list[str | None]:
    """Return the answer in each response; None where there is none.

    Args:
        how: name of a ready-made reader, or a function (package.module:function) that maps the text of a response to
            its answer: a text, a number or None.
        responses: the texts.
    """
    if how in READERS:
        return [READERS[how](response) for response in responses]
    try:
        function = resolve(how, KEY).load()
        return [_as_text(function(response), how) for response in responses]
    except RewardError:
        raise
    except Exception as problem:  # the user's code may raise anything
        reason = " ".join(str(problem).split())
        raise RewardError(
            f"{KEY}={how} raised {type(problem).__name__} ({reason}): correct the function", key=KEY, value=how
        ) from problem


def _as_text(answer: object, how: str) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int | float):
        return repr(answer)
    raise RewardError(
        f"{KEY}={how} returned a {type(answer).__name__} for a response: let it return a text, a number or None",
        key=KEY,
        value=how,
    )
