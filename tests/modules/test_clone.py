"""How the samples that behaviour is cloned from are read."""

from __future__ import annotations

from typing import Any

import pytest

from megarl.config.sections.data import PromptDataConfig
from megarl.data.dataset import SFTDataset
from megarl.data.prompts import encode_prompt, prompt_format
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

TOKENIZER = ByteTokenizer()
DATA = PromptDataConfig(
    prompt_key="question", messages_key="turns", chat_template="{% for m in messages %}{{ m.content }}!{% endfor %}"
)
ASKED = {"role": "user", "content": "ab"}


@pytest.mark.parametrize(
    ("prompt", "sample"),
    [
        ({"question": "ab"}, {"question": "ab", "completion": "c"}),
        ({"turns": [ASKED]}, {"turns": [ASKED, {"role": "assistant", "content": "c"}]}),
    ],
)
def test_a_sample_begins_with_the_tokens_that_its_prompt_has_in_training(
    prompt: dict[str, Any], sample: dict[str, Any]
) -> None:
    tokens = list(encode_prompt(Record(prompt, "file:1"), TOKENIZER, prompt_format(DATA)).tokens)
    (document,) = SFTDataset([Record(sample, "file:1")], TOKENIZER, 32, prompt_format(DATA)).documents
    assert list(document.tokens[: len(tokens)]) == tokens
    assert list(document.action_mask[: len(tokens) + 1]) == [0] * len(tokens) + [1]


def test_a_sample_without_the_keys_is_told_of_those_that_can_be_set() -> None:
    names = ("file:1", "'question'", "'turns'", "data.prompt_key", "data.messages_key")
    with refused(DataError, names=names) as found:
        SFTDataset([Record({"prompt": "ab", "completion": "c"}, "file:1")], TOKENIZER, 32, prompt_format(DATA))
    assert "data.completion_key" not in found.line
