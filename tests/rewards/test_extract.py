"""The answer in a response: what each reader finds, and what functions of the user may return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megarl.errors import RewardError
from megarl.rewards.builtin import exact_match, numeric_match
from megarl.rewards.extract import read_answers
from megarl.rewards.verifiable import boxed, multiple_choice
from tests.refusals import refused


@pytest.mark.parametrize(
    ("how", "response", "answer"),
    [
        ("text", " so  it\nis ", "so it is"),
        ("text", "  ", None),
        ("number", "17 + 25 = 42.0", "42"),
        ("number", "it is 42", "42"),
        ("number", "-0", "0"),
        ("number", "12,345.5", "12345.5"),
        ("number", "none", None),
        ("choice", "Answer: (B)", "B"),
        ("choice", "I think that it is C.", "C"),
        ("choice", "A", "A"),
        ("choice", "Perhaps B or D", "D"),
        ("choice", "DNA", None),
        ("choice", "The answer is b.", "B"),
        ("choice", "The answer is B, as A is wrong", "B"),
        ("choice", "The answer is Z", None),
        ("boxed", r"\boxed{1} and then \boxed{\frac{1}{2}}", "0.5"),
        ("boxed", r"\boxed{1} and then \boxed{2", "1"),
        ("boxed", r"\boxed{a\}b}", r"a\}b"),
        ("boxed", r"\boxed{ x^2 +  1 }", "x^2+1"),
        ("boxed", r"\boxed 5.", "5"),
        ("boxed", r"\boxed{}", None),
        ("boxed", "1", None),
    ],
)
def test_ready_made_readers(how: str, response: str, answer: str | None) -> None:
    assert read_answers(how, [response]) == [answer]


@pytest.mark.parametrize(
    ("how", "reward", "responses"),
    [
        ("boxed", boxed, (r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{50\%}", r"\boxed{1/2}", r"\boxed{x = .5}")),
        ("boxed", boxed, (r"\boxed{1,000}", r"\boxed{1{,}000}", r"\boxed{1 \times 10^{3}}", r"\boxed{\$1000.0}")),
        ("boxed", boxed, (r"\boxed{1/3}", r"\boxed{0.3333333333}", r"\boxed{0.3333}")),
        ("boxed", boxed, (r"\boxed{(1, 2)}", r"\boxed{\left(1,2\right)}", r"\boxed{(2, 1)}")),
        ("boxed", boxed, (r"\boxed{\text{Monday}}", r"\boxed{Monday}", r"\boxed{Tuesday}")),
        ("boxed", boxed, (rf"\boxed{{{'9' * 3000}}}", rf"\boxed{{{'9' * 2999}8}}")),
        ("boxed", boxed, (rf"\boxed{{{'9' * 3900}e900}}", rf"\boxed{{{'9' * 3899}8e900}}")),
        ("number", numeric_match, ("so 1,000", "1e3", "1000.0000000001", "1001")),
        ("choice", multiple_choice, ("The answer is (B)", "B. Paris", r"\boxed{B}", "b", "C", "I choose C")),
        ("text", exact_match, ("so it\nis", " so  it is", "so it was")),
    ],
)
def test_responses_vote_together_that_the_reward_takes_as_equal(
    how: str, reward: Callable[..., list[float]], responses: Sequence[str]
) -> None:
    answers = read_answers(how, responses)
    for response, answer in zip(responses, answers, strict=True):
        right = response if reward is not multiple_choice else answer
        same = [float(other == answer) for other in answers]
        assert reward(outputs=responses, answer=[right] * len(responses)) == same


def test_a_function_of_the_user_reads_answers(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def first(text):\n    return text.split()[0] if text else None\n"
        "def listed(text):\n    return [text]\n"
        "def broken(text):\n    return 1 / 0\n"
    )
    assert read_answers(f"{file}:first", ["a b", "", "c"]) == ["a", None, "c"]
    for name in ("listed", "broken"):
        with refused(RewardError, key="eval.vote", value=f"{file}:{name}"):
            read_answers(f"{file}:{name}", ["a"])


def test_equal_numbers_of_a_function_of_the_user_vote_together(tmp_path: Path) -> None:
    file = tmp_path / "values.py"
    file.write_text(
        "from fractions import Fraction\nimport numpy as np\n"
        "def value(text):\n    return eval(text, {'np': np, 'Fraction': Fraction})\n"
    )

    def answers(*texts: str) -> list[str | None]:
        return read_answers(f"{file}:value", texts)

    threes = answers("3", "3.0", "np.float64(3)", "np.int64(3)", "np.float32(3)", "Fraction(3)", "3 + 1e-12")
    assert len({*threes}) == 1
    assert len({*answers("0.5", "Fraction(1, 2)", "np.float64(0.5)")}) == 1
    apart = answers("3", "4", "float('inf')", "-float('inf')", "10 ** 5000", "10 ** 5000 + 1", "None")
    assert len({*apart}) == len(apart)
    assert len({*answers("float('inf')", "np.inf", "np.float64('inf')")}) == 1
    assert answers("float('nan')", "np.float64('nan')") == [None, None]
