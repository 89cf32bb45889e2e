"""Messages of customers with good and bad answers, and what makes an answer good.

    data.train=[examples/instruct/tasks.py:answers]    # self-instruct records, to fine-tune on
    data.train=[examples/instruct/tasks.py:pairs]      # two answers to a message; the better one is preferred
    data.train=[examples/instruct/tasks.py:messages]   # messages to answer
    metric.fn=examples/instruct/tasks.py:utility       # how good answers are, from 0 to 1

`held_out_pairs` and `held_out_messages` have the messages that the others leave out.
`python examples/instruct/tasks.py messages` prints the held-out messages, for `megarl.generate`;
`python examples/instruct/tasks.py utility FILE ...` prints the mean utility of the responses in each file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

INSTRUCTIONS = ("Answer the customer.", "Reply to this message.", "Write to this person.")
THINGS = ("parcel", "kettle", "jacket", "ladder", "pillow", "camera", "basket", "ticket")
QUESTIONS = {
    "Where is my {}?": "It comes today.",
    "My {} is broken.": "We repair it.",
    "I do not want the {}.": "Send it back.",
    "Was the {} sent?": "It was sent.",
}
"""What customers write, with what they want to know."""
EVASIONS = ("Look it up.", "We are not sure.")
CLOSINGS = (" Thank you.", " Goodbye.", " Leave us alone.", "")
FILLER = " We have a lot to do here, so it may take a while."
PER_MESSAGE = 8  # answers, and pairs, of each message
MOST_WORDS = 9


def utility(prompts: Sequence[str], outputs: Sequence[str], **fields: object) -> list[float]:
    """Return how good answers are: a third each for being right, for thanking, and for being short."""
    return [_utility(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def answers() -> list[dict[str, str]]:
    """Return several answers, good and bad, to each message to train on, as self-instruct records."""
    draw = random.Random(1)
    return [
        {**message, "output": _answer(message, draw)}
        for message in _messages(held_out=False)
        for _ in range(PER_MESSAGE)
    ]


def messages() -> list[dict[str, str]]:
    """Return the messages to train on."""
    return list(_messages(held_out=False))


def held_out_messages() -> list[dict[str, str]]:
    """Return the other messages."""
    return list(_messages(held_out=True))


def pairs() -> list[dict[str, str]]:
    """Return pairs of answers to each message to train on. The one with the higher utility is preferred."""
    return _pairs(held_out=False, seed=2)


def held_out_pairs() -> list[dict[str, str]]:
    """Return pairs of answers to the other messages."""
    return _pairs(held_out=True, seed=3)


def _messages(held_out: bool) -> Iterator[dict[str, str]]:
    """Yield messages. Of each thing and question, one of the three instructions is held out, by turns."""
    for (row, thing), (column, question) in product(enumerate(THINGS), enumerate(QUESTIONS)):
        for index, instruction in enumerate(INSTRUCTIONS):
            if (index == (row + column) % len(INSTRUCTIONS)) == held_out:
                yield {"instruction": instruction, "input": question.format(thing)}


def _answer(message: dict[str, str], draw: random.Random) -> str:
    """Return an answer. More than half of them are right, a quarter thank, and half are short."""
    first = draw.choice((_right(message["input"]), draw.choice((*QUESTIONS.values(), *EVASIONS))))
    return first + draw.choice(("", FILLER)) + draw.choice(CLOSINGS)


def _pairs(held_out: bool, seed: int) -> list[dict[str, str]]:
    draw, found = random.Random(seed), []
    for message in _messages(held_out):
        for _ in range(PER_MESSAGE):
            worse, better = sorted(
                (_answer(message, draw), _answer(message, draw)), key=lambda answer: _of(message, answer)
            )
            if _of(message, worse) < _of(message, better):
                found.append({**message, "chosen": better, "rejected": worse})
    return found


def _of(message: dict[str, str], answer: str) -> float:
    return _utility(message["input"], answer)


def _utility(prompt: str, output: str) -> float:
    return (
        float(_right(prompt) in output) + float("Thank you" in output) + float(len(output.split()) <= MOST_WORDS)
    ) / 3


def _right(prompt: str) -> str:
    """Return the right answer to the message in a prompt."""
    beginnings = {question.partition("{}")[0]: answer for question, answer in QUESTIONS.items()}
    return next(answer for beginning, answer in beginnings.items() if beginning in prompt)


def _main(argv: Sequence[str]) -> None:
    if argv == ["messages"]:
        for message in held_out_messages():
            print(json.dumps(message))
        return
    for file in argv[1:]:
        lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        found = utility([line["prompt"] for line in lines], [line["response"] for line in lines])
        print(f"{file}: utility {sum(found) / len(found):.2f} of {len(found)} responses")


if __name__ == "__main__":
    _main(sys.argv[1:])
