"""What a phase computed for each token of a few of its responses, for a person who wants to see which tokens became
more likely, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megarl.experience.collection import Collected
from megarl.parallel.rows import Rows
from megarl.rewards.answers import Score
from megarl.rewards.scores import total
from megarl.tokenizers.base import Tokenizer
from megarl.tokenizers.streaming import StreamedText

COLUMNS = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "advantages", "returns", "weights")
"""Columns of rows that a trace shows where the rows have them; `new_logprobs` are added."""
_MOST_TOKENS = 512  # of a response, in a trace


class Tracer:
    """Traces the first and the last phase of a run, and every phase that an evaluation follows."""

    def __init__(self, count: int, last: int | None, every: int | None) -> None:
        """
        Args:
            count: number of responses per traced phase; 0 traces none.
            last: number of phases of the run.
            every: number of phases between two evaluations; None without evaluations.
        """
        self.count, self.last, self.every = count, last, every

    def due(self, phase: int) -> bool:
        """Return whether a phase, counted from 1, is traced."""
        ends = phase in (1, self.last)
        return self.count > 0 and (ends or (self.every is not None and phase % self.every == 0))

    def records(
        self,
        rows: Rows,
        found: Collected,
        logprobs: Callable[[Rows], Tensor],
        tokenizer: Tokenizer,
    ) -> list[dict[str, Any]]:
        """Return a record for each traced response, to be written as JSON.

        Args:
            rows: the rows that the phase trained on, one per rollout.
            found: the rollouts, their prompts and scores.
            logprobs: returns the log-probs [rows, time] under the weights after the phase.
            tokenizer: decodes responses.
        """
        indices = spread(found.scores, self.count)
        taken = rows.take(torch.tensor(indices))
        taken = taken.with_columns(new_logprobs=logprobs(taken))
        names = [name for name in (*COLUMNS, "new_logprobs") if name in taken]
        special = {token: text for text, token in tokenizer.special_tokens.items()}
        records = []
        for row, index in enumerate(indices):
            rollout = found.rollouts[index]
            prompt, start = found.prompts[rollout.prompt_id], len(rollout.prompt)
            stop = min(len(rollout.tokens), start + _MOST_TOKENS)
            records.append(
                {
                    "index": row,
                    "prompt": prompt.text,
                    "where": prompt.where,
                    "score": float(total(found.scores[index])),
                    "finish_reason": rollout.finish_reason,
                    "length": len(rollout.response),
                    "tokens": list(pieces(rollout.response[: stop - start], tokenizer.decode, special)),
                    "token_ids": list(rollout.response[: stop - start]),
                    **{name: [_short(value) for value in taken[name][row, start:stop].tolist()] for name in names},
                }
            )
        return records


def spread(scores: Sequence[Score], count: int) -> list[int]:
    """Return the indices of at most `count` responses: the best, the worst, and others between them, by score."""
    order = sorted(range(len(scores)), key=lambda index: (-total(scores[index]), index))
    count = min(count, len(order))
    if count < 2:
        return order[:count]
    return [order[round(index * (len(order) - 1) / (count - 1))] for index in range(count)]


def pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], special: Mapping[int, str]) -> Iterator[str]:
    """Yield the text that each token adds; empty where a character needs the next token too. `special` has the names of
    tokens without a text, such as EOS."""
    text = StreamedText(decode)
    for index, token in enumerate(tokens):
        piece = special.get(token) or text.add(token)
        yield piece + text.end() if index == len(tokens) - 1 else piece


def _short(value: float) -> float:
    return float(f"{value:.5g}")
