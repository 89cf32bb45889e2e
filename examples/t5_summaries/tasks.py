"""Short reports with one sentence that matters, their summaries, and how much of a summary a response has.

    clone.data=[examples/t5_summaries/tasks.py:mixed_summaries]   # summaries of any of a report's sentences
    data.train=[examples/t5_summaries/tasks.py:reports]           # reports with the summary that is wanted
    reward.fn=examples/t5_summaries/tasks.py:overlap              # from 0 to 1

`held_out_reports` has reports that the others leave out. `python examples/t5_summaries/tasks.py` prints them, for
`megarl.generate`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

PLACES = ("Bern", "Cork", "Lima", "Oslo", "Rome", "Turku")
MISFORTUNES = {
    "the river rose": "flood",
    "a bridge fell": "collapse",
    "the mill burned": "fire",
    "snow closed the road": "blizzard",
}
"""What matters, with the word for it in a summary."""
OTHERS = {
    "the mayor won": "election",
    "the choir sang": "concert",
    "a market opened": "market",
    "the team played": "match",
}
"""What else happened."""
SENTENCES = 3
REPORTS = 400
HELD_OUT = 48


def overlap(outputs: Sequence[str], summary: Sequence[str], **_: object) -> list[float]:
    """Return how much each response has in common with the summary of its report, from 0 to 1: the mean of ROUGE-1 and
    ROUGE-2 (Lin 2004), F1 of words and of pairs of neighbouring words, without stemming."""
    return [_overlap(output, wanted) for output, wanted in zip(outputs, summary, strict=True)]


def reports() -> list[dict[str, str]]:
    """Return reports, each with the summary that the reward compares with."""
    return [{"prompt": report["prompt"], "summary": report["summaries"][0]} for report in _reports()[HELD_OUT:]]


def held_out_reports() -> list[dict[str, str]]:
    """Return other reports; those that happen to be among `reports`, too, are left out."""
    learned = {report["prompt"] for report in reports()}
    held_out = [report for report in _reports()[:HELD_OUT] if report["prompt"] not in learned]
    return [{"prompt": report["prompt"], "summary": report["summaries"][0]} for report in held_out]


def mixed_summaries() -> list[dict[str, str]]:
    """Return the reports of `reports` once for each of their sentences, with the summary of that sentence."""
    return [
        {"prompt": report["prompt"], "completion": summary}
        for report in _reports()[HELD_OUT:]
        for summary in report["summaries"]
    ]


def _reports() -> list[dict[str, list[str] | str]]:
    """Return seeded reports with a summary of each sentence, that of the sentence that matters first."""
    draw = random.Random(1)
    return [_report(draw) for _ in range(REPORTS)]


def _report(draw: random.Random) -> dict[str, list[str] | str]:
    """Return a report of a misfortune and other events, each in another place."""
    told = [draw.choice(list(MISFORTUNES)), *draw.sample(list(OTHERS), SENTENCES - 1)]
    words = MISFORTUNES | OTHERS
    events = list(zip(draw.sample(PLACES, SENTENCES), told, strict=True))
    sentences = [f"In {place} {event}." for place, event in events]
    draw.shuffle(sentences)
    return {"prompt": " ".join(sentences), "summaries": [f"{words[event]} in {place}" for place, event in events]}


def _overlap(output: str, wanted: str) -> float:
    ours, theirs = output.split(), wanted.split()
    return (_f1(ours, theirs) + _f1(_pairs(ours), _pairs(theirs))) / 2


def _f1(ours: Sequence[object], theirs: Sequence[object]) -> float:
    """Return the harmonic mean of precision and recall of what `ours` has of `theirs`."""
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


if __name__ == "__main__":
    for one in held_out_reports():
        print(json.dumps(one))
