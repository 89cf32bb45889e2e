"""Behaviour cloning before the first phase."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf
from megarl.config.sections.data import SOURCES

CLONE = "Behaviour cloning on samples before the first phase; the model that comes out of it is also the reference."


@dataclass
class CloneConfig(Section):
    """Behaviour cloning on samples before the first phase."""

    data: list[str] = leaf(
        [],
        SOURCES.format("Samples to clone") + " A sample is a conversation under data.messages_key, a prompt under "
        'data.prompt_key with its "completion", an "instruction" with its "output", or a "text".',
    )
    steps: int = leaf(400, "Number of optimizer steps, each of trainer.global_batch_size samples.", at_least=1)
    lr: float = leaf(1e-3, "Constant learning rate, without warm-up.", at_least=0)
