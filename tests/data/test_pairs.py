"""Pairs of a preferred and a rejected response, as published data sets write them."""

from __future__ import annotations

from typing import Any

import pytest

from megarl.data.formats import Document
from megarl.data.responses import ResponseFormat
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

BYTES = ByteTokenizer()
EOS = BYTES.eos_id
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    """u:question, a:answer."""
    roles = {"u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in texts]


def read(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Of both documents the text that is a prompt, and the text that is trained on."""
    template = None if all(not isinstance(value, list) for value in record.values()) else CHAT
    pair = ResponseFormat(chat_template=template).pair(Record(record, "pairs.jsonl:4"), BYTES)
    return [(_text(document, 0), _text(document, 1)) for document in pair]


def _text(document: Document, trained: int) -> str:
    tokens = [int(token) for token, one in zip(document.tokens, document.action_mask, strict=True) if one == trained]
    return "".join("$" if token == EOS else chr(token) for token in tokens)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "five"}, [("2+2=", "4$"), ("2+2=", "five$")]),
        (
            {"messages": turns("u:hi"), "chosen": "yo", "rejected": "no"},
            [("<user>hi<assistant>", "yo</s>"), ("<user>hi<assistant>", "no</s>")],
        ),
        (
            {"messages": turns("u:hi"), "chosen": turns("a:yo"), "rejected": turns("a:no")},
            [("<user>hi<assistant>", "yo</s>"), ("<user>hi<assistant>", "no</s>")],
        ),
        (  # the prompt is what both begin with
            {"chosen": turns("u:hi", "a:yo", "u:so?", "a:1"), "rejected": turns("u:hi", "a:yo", "u:so?", "a:2")},
            [
                ("<user>hi<assistant>yo</s><user>so?<assistant>", "1</s>"),
                ("<user>hi<assistant>yo</s><user>so?<assistant>", "2</s>"),
            ],
        ),
        (  # published data sets have the preferred conversation once more, as messages
            {
                "prompt": "hi",
                "messages": turns("u:hi", "a:yo"),
                "chosen": turns("u:hi", "a:yo"),
                "rejected": turns("u:hi", "a:no"),
            },
            [("<user>hi<assistant>", "yo</s>"), ("<user>hi<assistant>", "no</s>")],
        ),
        (
            {"prompt": turns("u:hi"), "chosen": turns("u:hi", "a:yo"), "rejected": turns("u:hi", "a:no")},
            [("<user>hi<assistant>", "yo</s>"), ("<user>hi<assistant>", "no</s>")],
        ),
        ({"prompt": None, "chosen": "so 1", "rejected": "so 2"}, [("so ", "1$"), ("so ", "2$")]),
        (  # responses of several turns
            {"chosen": turns("u:hi", "a:1", "u:why", "a:2"), "rejected": turns("u:hi", "a:0", "u:how", "a:3")},
            [
                ("<user>hi<assistant><user>why<assistant>", "1</s>2</s>"),
                ("<user>hi<assistant><user>how<assistant>", "0</s>3</s>"),
            ],
        ),
    ],
)
def test_both_responses_are_behind_the_prompt(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert read(record) == expected


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "chosen"),
        ({"chosen": "b", "rejected": "c"}, "prompt"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "chosen"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected"),
        ({"messages": turns("u:hi"), "chosen": "", "rejected": "c"}, "chosen"),
        ({"messages": turns("u:hi"), "chosen": turns("a:b"), "rejected": turns("a:")}, "rejected"),
        ({"chosen": turns("u:hi", "a:1"), "rejected": turns("u:hi")}, "rejected"),
        ({"chosen": turns("u:hi", "a:1"), "rejected": turns("u:hi", "a:1")}, "chosen"),
        ({"chosen": turns("a:1"), "rejected": turns("a:2")}, "chosen"),
        ({"chosen": [], "rejected": []}, "chosen"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(record: dict[str, Any], key: str) -> None:
    with refused(DataError, key=key, where="pairs.jsonl:4"):
        read(record)
