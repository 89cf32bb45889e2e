"""Pairs and labelled responses become rows; what cannot be used is refused, or counted and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megarl.config.sections.data import LabelledDataConfig
from megarl.data.pairs import ResponseData, mismatched, read_units
from megarl.data.responses import ResponseFormat
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

BYTES = ByteTokenizer()
GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(one, f"file:{number}") for number, one in enumerate(fields, 1)]


def pairs(*fields: dict[str, Any], **settings: Any) -> ResponseData:
    return read_units(records(*fields), BYTES, ResponseFormat(), LabelledDataConfig(**settings), "data.train", "pairs")


def labelled(*fields: dict[str, Any], **settings: Any) -> ResponseData:
    return read_units(
        records(*fields), BYTES, ResponseFormat(), LabelledDataConfig(**settings), "data.train", "labelled"
    )


def texts(data: ResponseData) -> list[str]:
    return [bytes(t for t in document.tokens.tolist() if t < 256).decode() for document in data.documents]


def test_the_two_rows_of_a_pair_follow_each_other() -> None:
    data = pairs(GOOD, {"prompt": "r", "chosen": "a", "rejected": "bc"})
    assert texts(data) == ["qgood", "qbad", "ra", "rbc"]
    assert data.lengths.tolist() == [6 + 5, 3 + 4]
    rows = data.take(torch.tensor([1, 0]))
    assert rows["unit"].tolist() == [0, 0, 1, 1]
    assert rows.lengths.tolist() == [3, 4, 6, 5]
    assert rows.action_mask.sum(dim=1).tolist() == [2, 3, 5, 4]


def test_without_a_prompt_it_is_the_tokens_that_both_texts_begin_with() -> None:
    data = pairs({"chosen": "Human: hi Bot: yes", "rejected": "Human: hi Bot: no"})
    masks = [document.action_mask.sum() for document in data.documents]
    assert masks == [len("yes") + 1, len("no") + 1]
    assert str(data.stats.transcripts) == "file:1"
    assert pairs(GOOD).stats.transcripts.count == 0


def for_an_encoder() -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.ends_prompts = True
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("pairs", {"prompt": "why?", "chosen": "so", "rejected": "no"}),
        ("pairs", {"chosen": "why?so", "rejected": "why?no"}),
        ("labelled", {"prompt": "why?", "chosen": "so", "rejected": "no"}),
        ("ranking", {"prompt": "why?", "responses": ["so", "no"]}),
        ("regression", {"prompt": "why?", "completion": "so", "score": 0.5}),
        ("steps", {"prompt": "why?", "steps": ["so", "no"], "labels": [1, 0]}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_encoder_reads_the_prompt_up_to_eos_and_the_decoder_the_rest(kind: str, record: dict[str, Any]) -> None:
    """Also where only the ends of steps are marked, or the prompt is what two texts begin with."""
    settings = LabelledDataConfig()
    data = read_units(records(record), for_an_encoder(), ResponseFormat(), settings, "data.train", kind)
    rows = data.take(torch.tensor([0]))
    eos = BYTES.eos_id
    for tokens, length, prompt in zip(rows.tokens, rows.lengths, rows.prompts, strict=True):
        assert tokens[:prompt].tolist() == [*b"why?", eos]
        response = bytes(tokens[prompt : length - 1].tolist()).decode()
        assert response in ("so", "no", "so\nno")
        assert tokens[length - 1] == eos


def test_an_encoder_reads_a_conversation_up_to_its_last_answer() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    record = {"messages": talk, "chosen": "so", "rejected": "no"}
    tokenizer = for_an_encoder()
    data = read_units(records(record), tokenizer, ResponseFormat(), LabelledDataConfig(), "data.train", "pairs")
    for document in data.documents:
        start = int(document.action_mask.argmax())
        assert document.tokens[:start].tolist() == tokenizer.encode_chat_prompt(talk)
        assert bytes(document.tokens[start:-1].tolist()) in (b"so", b"no")


def test_pairs_become_labelled_responses_and_stand_beside_them() -> None:
    data = labelled(
        GOOD, {"prompt": "q", "completion": "x", "label": False}, {"prompt": "q", "completion": "y", "label": 1}
    )
    assert texts(data) == ["qgood", "qbad", "qx", "qy"]
    assert data.per_row["desirable"].tolist() == [True, False, False, True]
    assert data.take(torch.tensor([3]))["desirable"].tolist() == [True]


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({**GOOD, "rejected": "good"}, "chosen"),
        ({**GOOD, "rejected": ""}, "rejected"),
        ({"chosen": "abc", "rejected": "abcd"}, "chosen"),
        ({"chosen": "abc", "rejected": "xyz"}, "prompt"),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused_or_counted(record: dict[str, Any], key: str) -> None:
    with refused(DataError, key=key, where="file:2", offers={"data.on_error": ["drop"]}):
        pairs(GOOD, record)
    data = pairs(GOOD, record, on_error="drop")
    assert (len(data), data.stats.records, str(data.stats.unusable)) == (1, 2, "file:2")
    with refused(DataError, key="data.seq_length"):
        pairs(record, on_error="drop")


def test_nulls_are_absent_and_numpy_labels_are_labels() -> None:
    data = labelled(
        {**GOOD, "completion": None, "label": None},
        {"prompt": "q", "completion": "x", "label": np.bool_(True), "chosen": None},
    )
    assert texts(data) == ["qgood", "qbad", "qx"]


def test_labels_must_be_labels_and_of_both_kinds() -> None:
    for label in (None, "yes", 2, 0.5):
        with refused(DataError, key="label", where="file:1"):
            labelled({"prompt": "q", "completion": "x", "label": label})
    with refused(DataError, key="data.label_key"):
        labelled(*[{"prompt": "q", "completion": text, "label": True} for text in "xy"])


def test_long_pairs_are_cut_left_out_or_refused() -> None:
    long = {"prompt": "q", "chosen": "a" * 20, "rejected": "b"}
    data = pairs(GOOD, long, seq_length=8)
    assert list(map(len, data.documents)) == [6, 5, 8, 3]
    assert str(data.stats.truncated) == "file:2"
    assert len(pairs(GOOD, long, seq_length=8, too_long="drop")) == 1
    with refused(DataError, key="data.seq_length", where="file:2"):
        pairs(GOOD, long, seq_length=8, too_long="error")


def test_a_pair_whose_difference_is_cut_off_is_left_out() -> None:
    for one in ({"prompt": "q", "chosen": "a" * 9 + "b", "rejected": "a" * 9 + "c"}, {**GOOD, "prompt": "q" * 20}):
        data = pairs(GOOD, one, seq_length=8)
        assert (len(data), str(data.stats.too_long)) == (1, "file:2")


def test_each_prompt_meets_the_next_response() -> None:
    data = labelled(
        {"prompt": "one", "completion": "A", "label": True},
        {"prompt": "t", "completion": "BB", "label": False},
        {"prompt": "three", "completion": "CCCCC", "label": True},
    )
    rows = mismatched(data.take(torch.arange(3)), longest=7)
    read = [
        bytes(t for t in row[:n].tolist() if t < 256).decode() for row, n in zip(rows.tokens, rows.lengths, strict=True)
    ]
    assert read == ["oneBB", "tCCCCC", "threeA"]
    assert rows.action_mask.sum(dim=1).tolist() == [3, 6, 2]
    assert np.array_equal(rows.lengths, [6, 7, 7])


def test_a_response_of_other_rows_keeps_a_token_where_the_prompt_fills_the_row() -> None:
    data = labelled(
        {"prompt": "a" * 7, "completion": "x", "label": True},
        {"prompt": "b", "completion": "yyyyyy", "label": False},
        seq_length=8,
    )
    rows = mismatched(data.take(torch.arange(2)), longest=7)
    assert rows.action_mask.sum(dim=1).min() == 1
