"""The reward function of this project, which conf/mine.yaml names: reward.fn=rewards.py:score."""

from __future__ import annotations

from collections.abc import Sequence


def score(outputs: Sequence[str], letter: Sequence[str], **metadata: object) -> list[float]:
    """Return for each response the share of its characters that are the letter it should write.

    Args:
        outputs: the responses.
        letter: the field `letter` of each response's record in prompts.jsonl.
        metadata: everything else: `prompts`, `samples`, `tokenizer` and the other fields of the records.
    """
    return [_share(output, wanted) for output, wanted in zip(outputs, letter, strict=True)]


def _share(output: str, wanted: str) -> float:
    return output.count(wanted) / len(output) if output else 0.0
