"""The demo set: small tasks that a small byte model starts to learn within a minute on a CPU.

Sums, spelling, reversals, colours and sounds, as prompts with completions. `data.train=[megarl.tasks.demo:train]
data.eval=[megarl.tasks.demo:held_out]`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

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

PLACES = ("at home", "at night", "in the garden", "by the river", "in the rain", "all day")


def train() -> list[dict[str, str]]:
    """Return the 400 records to train on."""
    return _records()[EVAL_RECORDS : EVAL_RECORDS + TRAIN_RECORDS]


def held_out() -> list[dict[str, str]]:
    """Return the 60 records to evaluate on. Their prompts are not trained on."""
    return _records()[:EVAL_RECORDS]


def _records() -> list[dict[str, str]]:
    """Return all records in a seeded order, each prompt once."""
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
