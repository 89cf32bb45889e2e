"""Questions about films, meals and walks, with pleased and displeased answers, for the preset `sentiment`.

`clone.data=[megarl.tasks.sentiment:train] data.eval=[megarl.tasks.sentiment:held_out]`; the reward
`megarl.rewards.builtin:sentiment` counts pleased words.
"""

from __future__ import annotations

import random

THINGS = ("film", "book", "song", "play", "meal", "trip", "game", "show", "walk", "party", "story", "concert")
QUESTIONS = ("How was the {}?", "What was the {} like?", "Tell me about the {}.")
PLEASED = ("good", "great", "lovely", "warm", "funny", "bright", "gentle", "wonderful")
DISPLEASED = ("bad", "dull", "sad", "slow", "boring", "awful", "gloomy", "poor")
ANSWERS = 10  # to each question


def train() -> list[dict[str, str]]:
    """Return prompts with ten answers each, as often pleased as not, in a seeded order."""
    return _records()[0]


def held_out() -> list[dict[str, str]]:
    """Return one question about each thing, none of which is in `train`."""
    return _records()[1]


def _records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the records of `train` and of `held_out`."""
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
