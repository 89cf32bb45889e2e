"""How text becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf


@dataclass
class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: str = leaf("bytes", "Kind of tokenizer.", ("bytes", "characters", "sentencepiece", "huggingface"))
    path: str | None = leaf(
        None,
        "What the tokenizer is made from. characters: the alphabet as text, or the folder of a saved tokenizer; "
        "sentencepiece: a model file, or a folder with tokenizer.model; huggingface: a folder or hub name; bytes: "
        "nothing.",
    )
