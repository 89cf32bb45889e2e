"""Files in the layout of Anthropic/hh-rlhf: pairs of whole transcripts, in a file for each split."""

import json
from pathlib import Path

THINGS = ("river", "stone", "cloud", "horse", "ribbon", "kettle", "window", "garden")


def transcript(question: str, *turns: str) -> str:
    """The text of a dialogue, in turns of a human and an assistant."""
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[index % 2]}: {turn}" for index, turn in enumerate((question, *turns)))


def write_hh(folder: Path) -> None:
    """Write train.jsonl and test.jsonl. The first record of each has two equal transcripts, as some published ones."""
    same = transcript("Hello?", "Hello.")
    for split, question in (("train", "Do you see the {}?"), ("test", "Is there a {}?")):
        records = [{"chosen": same, "rejected": same}]
        for thing in THINGS:
            asked = (question.format(thing), "Which one?", f"The small {thing}.")
            answers = (f"Yes, I see the {thing}.", "Go away.")
            chosen, rejected = (transcript(*asked, answer) for answer in answers)
            records.append({"chosen": chosen, "rejected": rejected})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
