"""Writes the demo sets beside this file, the same files every time: tasks (train.jsonl, eval.jsonl), and answers of
good and bad feeling (feelings-train.jsonl, feelings-eval.jsonl).

Run it with `python -m megarl.data.demo.make` after a change here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

TRAIN_RECORDS = 400
EVAL_RECORDS = 60

WORDS = [
    "apple", "bread", "chair", "cloud", "dance", "eagle", "fence", "glass", "horse", "ivory",
    "juice", "knife", "lemon", "mouse", "night", "ocean", "paper", "queen", "river", "stone",
    "table", "uncle", "voice", "water", "young", "zebra", "acorn", "beach", "candle", "dragon",
    "engine", "flower", "garden", "hammer", "island", "jacket", "kitten", "ladder", "market", "needle",
    "orange", "pencil", "rabbit", "silver", "ticket", "valley", "window", "yellow", "basket", "copper",
    "desert", "forest", "bottle", "castle", "dinner", "feather", "ribbon", "saddle", "tunnel", "walnut",
]  # fmt: skip

COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "a lemon": "yellow",
    "a cherry": "red", "chocolate": "brown", "a carrot": "orange", "milk": "white", "a leaf": "green",
    "a banana": "yellow", "blood": "red", "the sea": "blue", "a raven": "black", "a frog": "green",
    "a tomato": "red", "salt": "white", "the sun": "yellow", "a pumpkin": "orange", "soil": "brown",
}  # fmt: skip

ANIMALS = {
    "dog": "barks", "cat": "purrs", "cow": "moos", "duck": "quacks", "lion": "roars", "bee": "buzzes",
    "frog": "croaks", "owl": "hoots", "horse": "neighs", "wolf": "howls",
}  # fmt: skip

THINGS = ("film", "book", "song", "play", "meal", "trip", "game", "show", "walk", "party", "story", "concert")
QUESTIONS = ("How was the {}?", "What was the {} like?", "Tell me about the {}.")
PLEASED = ("good", "great", "lovely", "warm", "funny", "bright", "gentle", "wonderful")
DISPLEASED = ("bad", "dull", "sad", "slow", "boring", "awful", "gloomy", "poor")
ANSWERS = 10  # to each question

PLACES = ("at home", "at night", "in the garden", "by the river", "in the rain", "all day")


def records() -> list[dict[str, str]]:
    """All records in a seeded order, each prompt once."""
    found = [
        {"prompt": prompt + "\n", "completion": completion}
        for task in (_sums, _copies, _reversals, _colours, _sounds)
        for prompt, completion in task()
    ]
    random.Random(1).shuffle(found)
    return found


def _sums() -> Iterator[tuple[str, str]]:
    for left in range(10):
        for right in range(10):
            yield f"Add {left} and {right}.", f"{left} + {right} = {left + right}"


def _copies() -> Iterator[tuple[str, str]]:
    for word in WORDS:
        yield f"Say {word} twice.", f"{word} {word}"
        yield f"Spell {word}.", "-".join(word)


def _reversals() -> Iterator[tuple[str, str]]:
    for word in WORDS:
        yield f"Reverse {word}.", word[::-1]
        yield f"Write {word} in capitals.", word.upper()


def _colours() -> Iterator[tuple[str, str]]:
    for thing, colour in COLOURS.items():
        yield f"What colour is {thing}?", f"{thing.capitalize()} is {colour}."
        yield f"Is {thing} {colour}?", f"Yes, {thing} is {colour}."
        yield f"Name the colour of {thing}.", colour.capitalize() + "."


def _sounds() -> Iterator[tuple[str, str]]:
    for animal, sound in ANIMALS.items():
        for place in PLACES:
            yield f"What does a {animal} do {place}?", f"A {animal} {sound} {place}."


def feelings() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Records to train on, as often pleased as not, and to evaluate on: a question about each thing, held out."""
    draw = random.Random(1)
    train, held_out = [], []
    for number, thing in enumerate(THINGS):
        for question in QUESTIONS:
            prompt = question.format(thing) + "\n"
            answers = [
                f"The {thing} was {draw.choice(PLEASED + DISPLEASED)} and {draw.choice(PLEASED + DISPLEASED)}."
                for _ in range(ANSWERS)
            ]
            if question == QUESTIONS[number % len(QUESTIONS)]:
                held_out.append({"prompt": prompt, "completion": answers[0]})
            else:
                train += [{"prompt": prompt, "completion": answer} for answer in answers]
    draw.shuffle(train)
    return train, held_out


def render(items: list[dict[str, str]]) -> str:
    """The text of a .jsonl file."""
    return "".join(json.dumps(item) + "\n" for item in items)


def files() -> dict[str, str]:
    """Name and text of each file of the demo sets; evaluation prompts are not trained on."""
    found = records()
    felt, asked = feelings()
    return {
        "feelings-train.jsonl": render(felt),
        "feelings-eval.jsonl": render(asked),
        "train.jsonl": render(found[EVAL_RECORDS : EVAL_RECORDS + TRAIN_RECORDS]),
        "eval.jsonl": render(found[:EVAL_RECORDS]),
    }


def main() -> None:
    """Write the files."""
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
