"""The answer in the text of a response, for majority votes: ready-made readers, and functions of the user.

Responses vote for the same answer where the reward function of the same kind takes one as right if the other is right:
`exact_match` for text, `numeric_match` for number, `multiple_choice` for choice and `boxed` for boxed. Two things that
these functions know are not known here: `choice` reads the letters A to J only, not the texts of the choices, and
`boxed` removes no units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Real

from megarl.errors import RewardError
from megarl.functions.named import resolve
from megarl.rewards.builtin import last_number
from megarl.rewards.choices import chosen_letter
from megarl.rewards.fields import one_spaced
from megarl.rewards.latex import last_boxed, normal_text, number_in

KEY = "eval.vote"


def text(response: str) -> str | None:
    """Return the whole response, with single spaces for white space; None if it is empty."""
    return one_spaced(response) or None


def number(response: str) -> str | None:
    """Return the last number in the response, in one form for equal numbers; None without a number."""
    found = last_number(response)
    return None if found is None else _number_form(found)


def choice(response: str) -> str | None:
    """Return the letter, A to J, of the choice that the response states last; None if it states none."""
    return chosen_letter(response)


def boxed(response: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}`; None without one, or with an empty one.

    Equal numbers have one form, and so have texts that differ in white space and font commands only.
    """
    box = last_boxed(response)
    if box is None:
        return None
    plain = normal_text(box)
    value = number_in(plain)
    return (plain or None) if value is None else _number_form(value)


def _number_form(value: float | Fraction) -> str:
    """Return a number with ten digits, as the rewards take numbers as equal that differ by less than 1e-9 of them."""
    try:
        return f"{float(value) + 0.0:.10g}"  # -0.0 + 0.0 is 0.0
    except OverflowError:
        return hex(int(value))  # decimals of so many digits are refused by Python


READERS: dict[str, Callable[[str], str | None]] = {"text": text, "number": number, "choice": choice, "boxed": boxed}


def read_answers(how: str, responses: Sequence[str]) -> list[str | None]:
    """Return the answer in each response; None where there is none.

    Args:
        how: name of a ready-made reader, or a function (package.module:function) that maps the text of a response to
            its answer: a text, a number or None. Equal numbers vote together; NaN is no answer.
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
    if isinstance(answer, Real):  # numpy's numbers are, too
        value = answer if isinstance(answer, int | Fraction) else float(answer)
        return None if value != value else _number_form(value)  # NaN is not equal to itself
    raise RewardError(
        f"{KEY}={how} returned a {type(answer).__name__} for a response: let it return a text, a number or None",
        key=KEY,
        value=how,
    )
