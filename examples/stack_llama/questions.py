"""Questions about programming with answers that got votes, in the manner of a question-and-answer site.

    data.train=[examples/stack_llama/questions.py:answers]    # every answer, to fine-tune on
    data.train=[examples/stack_llama/questions.py:pairs]      # of two answers, the one with more votes is preferred

`held_out_answers` and `held_out_pairs` have the questions that the other two leave out.
`python examples/stack_llama/questions.py` prints these questions, for `megarl.generate`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations

PHRASES = ("How do I {} in {}?", "What is the way to {} in {}?", "Tell me how to {} in {}.")
LANGUAGES = ("Python", "Ruby", "JavaScript", "Java", "Go", "Rust")
CALLS = {
    "get the length of a list": ("len(x)", "x.length", "x.length", "x.size()", "len(x)", "x.len()"),
    "add to a list": ("x.append(y)", "x.push(y)", "x.push(y)", "x.add(y)", "x = append(x, y)", "x.push(y)"),
    "sort a list": ("x.sort()", "x.sort!", "x.sort()", "Collections.sort(x)", "slices.Sort(x)", "x.sort()"),
    "reverse a list": (
        *("x.reverse()", "x.reverse!", "x.reverse()"),
        *("Collections.reverse(x)", "slices.Reverse(x)", "x.reverse()"),
    ),
    "make a text upper case": (
        *("x.upper()", "x.upcase", "x.toUpperCase()"),
        *("x.toUpperCase()", "strings.ToUpper(x)", "x.to_uppercase()"),
    ),
    "print a value": (
        *("print(x)", "puts x", "console.log(x)"),
        *("System.out.println(x)", "fmt.Println(x)", 'println!("{x}")'),
    ),
}
ANSWERS = {"Use `{}`.": 5, "Maybe `{}`, but I did not try it.": 1, "Why do you want to do that?": -2}
"""Answers to every question, with their votes."""


def answers() -> list[dict[str, str]]:
    """Return every answer to the questions to train on, as a prompt with its completion."""
    return _answers(held_out=False)


def held_out_answers() -> list[dict[str, str]]:
    """Return every answer to the other questions."""
    return _answers(held_out=True)


def pairs() -> list[dict[str, str]]:
    """Return every two answers to the questions to train on: the one with more votes is preferred."""
    return _pairs(held_out=False)


def held_out_pairs() -> list[dict[str, str]]:
    """Return every two answers to the other questions."""
    return _pairs(held_out=True)


def _questions(held_out: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield prompts, each with the votes of its answers. One phrase in three is held out, by turns."""
    for row, (task, calls) in enumerate(CALLS.items()):
        for column, (language, call) in enumerate(zip(LANGUAGES, calls, strict=True)):
            for index, phrase in enumerate(PHRASES):
                if (index == (row + column) % len(PHRASES)) == held_out:
                    votes = {answer.replace("{}", call): count for answer, count in ANSWERS.items()}
                    yield f"Question: {phrase.format(task, language)}\n\nAnswer: ", votes


def _answers(held_out: bool) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": answer} for prompt, votes in _questions(held_out) for answer in votes]


def _pairs(held_out: bool) -> list[dict[str, str]]:
    found = []
    for prompt, votes in _questions(held_out):
        for two in combinations(votes, 2):
            worse, better = sorted(two, key=votes.__getitem__)
            found.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return found


if __name__ == "__main__":
    for prompt, _ in _questions(held_out=True):
        print(json.dumps({"prompt": prompt}))
