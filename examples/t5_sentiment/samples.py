"""Answers to questions about films, meals and walks, each with how pleased it sounds, for ILQL.

    data.train=[examples/t5_sentiment/samples.py:rated]

The questions and answers are those of `megarl.tasks.sentiment`, as often pleased as not, and the rewards those of
`megarl.rewards.builtin:sentiment`.
"""

from __future__ import annotations

from megarl.rewards.builtin import sentiment
from megarl.tasks.sentiment import train


def rated() -> list[dict[str, object]]:
    """Return a question, an answer and the answer's reward in each record."""
    records = train()
    rewards = sentiment([record["completion"] for record in records])
    return [
        {"samples": [record["prompt"], record["completion"]], "rewards": reward}
        for record, reward in zip(records, rewards, strict=True)
    ]
