"""The answer in a response: what each reader finds, and what functions of the user may return."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.errors import RewardError
from megarl.rewards.extract import read_answers
from tests.refusals import refused


@pytest.mark.parametrize(
    ("how", "response", "answer"),
    [
        ("text", " so  it\nis ", "so it is"),
        ("text", "  ", None),
        ("number", "17 + 25 = 42.0", "42.0"),
        ("number", "it is 42", "42.0"),
        ("number", "-0", "0.0"),
        ("number", "none", None),
        ("choice", "Answer: (B)", "B"),
        ("choice", "I think that it is C.", "C"),
        ("choice", "A", "A"),
        ("choice", "Perhaps B or D", "D"),
        ("choice", "DNA", None),
        ("boxed", r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} and then \boxed{2", "1"),
        ("boxed", "1", None),
    ],
)
def test_ready_made_readers(how: str, response: str, answer: str | None) -> None:
    assert read_answers(how, [response]) == [answer]


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
