"""Short reports with one sentence that matters, their summaries, and how much of a summary's words a response has.

    clone.data=[examples/t5_summaries/tasks.py:mixed_summaries]   # summaries, half of which are of other sentences
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
EVENTS = {
    "the river rose": "flood",
    "a bridge fell": "collapse",
    "the mill burned": "fire",
    "the trains stood still": "strike",
    "the mayor won": "election",
    "snow closed the road": "blizzard",
}
"""What happened, with the word for it in a summary."""
MARK = "Above all, "
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
    """Return other reports."""
    return [{"prompt": report["prompt"], "summary": report["summaries"][0]} for report in _reports()[:HELD_OUT]]


def mixed_summaries() -> list[dict[str, str]]:
    """Return the reports of `reports` four times: twice with the summary that is wanted, and once with that of each
    other sentence."""
    return [
        {"prompt": report["prompt"], "completion": summary}
        for report in _reports()[HELD_OUT:]
        for summary in (report["summaries"][0], *report["summaries"])
    ]


def _reports() -> list[dict[str, list[str] | str]]:
    """Return seeded reports with a summary of each sentence, that of the sentence that matters first."""
    draw = random.Random(1)
    return [_report(draw) for _ in range(REPORTS)]


def _report(draw: random.Random) -> dict[str, list[str] | str]:
    """Return a report about different places and events, in which one sentence begins with `MARK`."""
    events = list(zip(draw.sample(PLACES, SENTENCES), draw.sample(list(EVENTS), SENTENCES), strict=True))
    sentences = [f"in {place} {event}." for place, event in events]
    sentences = [MARK + sentences[0], *(sentence[0].upper() + sentence[1:] for sentence in sentences[1:])]
    draw.shuffle(sentences)
    return {
        "prompt": " ".join(sentences),
        "summaries": [f"{EVENTS[event]} in {place}" for place, event in events],
    }


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
