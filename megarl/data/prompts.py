"""Prompts to be answered: records with a prompt or a conversation, and what else they hold, for reward functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megarl.config.rl import PromptDataConfig
from megarl.data.formats import load_chat_template
from megarl.data.order import TrainBatches
from megarl.data.randomwalks import RANDOMWALKS, task
from megarl.data.sources import Record, read_records
from megarl.errors import DataError
from megarl.tokenizers import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """`metadata` is the record's other fields, `where` its file and line, for messages."""

    text: str
    tokens: tuple[int, ...]
    metadata: dict[str, Any]
    where: str = field(default="", compare=False)


def read_prompts(paths: Sequence[str], split: str, data: PromptDataConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Every record's prompt. The path `randomwalks` stands for the starts of that task's graph."""
    template = load_chat_template(data.chat_template)
    records = (record for path in paths for record in _read(path, split, data))
    return [
        encode_prompt(record, tokenizer, data.prompt_key, data.messages_key, template, "data.") for record in records
    ]


def encode_prompt(
    record: Record, tokenizer: Tokenizer, prompt_key: str, messages_key: str, template: str | None, section: str = ""
) -> Prompt:
    """A record's prompt as text and tokens; `section` is where the configuration keeps the two keys."""
    fields = dict(record.fields)
    messages, text = fields.get(messages_key), fields.get(prompt_key)
    try:
        if messages is not None:
            tokens = tokenizer.apply_chat_template(messages, True, template)
            text = tokenizer.decode(tokens)
        elif isinstance(text, str):
            tokens = tokenizer.encode_prompt(text)
    except DataError as problem:
        raise DataError(f"{record.where}: {problem}") from None
    if not isinstance(text, str):
        raise DataError(
            f"{record.where}: has no text under {prompt_key!r} and no conversation under {messages_key!r}, only "
            f"{', '.join(map(repr, fields)) or 'nothing'}: set {section}prompt_key or {section}messages_key"
        )
    if not tokens:
        raise DataError(f"{record.where}: the prompt is empty and has no tokens: write one, or take the record out")
    others = {key: value for key, value in fields.items() if key not in (prompt_key, messages_key)}
    return Prompt(text, tuple(tokens), others, record.where)


def _read(path: str, split: str, data: PromptDataConfig) -> Iterator[Record]:
    if path != RANDOMWALKS:
        yield from read_records([path], split, data.prompt_key)
        return
    for start in task(data.graph_seed).starts:
        yield Record({data.prompt_key: start, "graph_seed": data.graph_seed}, f"randomwalks {data.graph_seed}")


class PhaseLoader:
    """Without end, the numbers of each phase's prompts, in an order that follows from the seed."""

    def __init__(
        self, prompts: Sequence[Prompt], per_phase: int, seed: int, start: int = 0, rows: int | None = None
    ) -> None:
        """`start` is the phase to begin with, `rows` the prompts of those before it (None: as many in each)."""
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        self.batches = TrainBatches(lengths, per_phase, seed, start=start, rows=rows)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches:
            yield rows.tolist()
