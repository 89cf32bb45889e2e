"""Ranked, scored and stepwise responses become units; what cannot be learned from is refused with file and key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarl.config.sections.data import ScoredDataConfig
from megarl.data.pairs import ResponseData, build_preference_data, read_units
from megarl.data.responses import ResponseFormat
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

BYTES = ByteTokenizer()
EOS = BYTES.eos_id
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }};"
    "{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
SETTABLE = [name for name in ScoredDataConfig.__dataclass_fields__ if name.endswith("_key")]
FORMAT = ResponseFormat(chat_template=TEMPLATE, settable=tuple(SETTABLE))
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
LIST = {"prompt": "q", "responses": ["a", "bb", "ccc"]}
SCORED = {"prompt": "q", "completion": "x", "score": 0.5}
STEPS = {"prompt": "q", "steps": ["one", "two"], "labels": [1, 0]}
ASKED = [{"role": "user", "content": "q"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def read(kind: str, *fields: dict[str, Any], **settings: Any) -> ResponseData:
    records = [Record(one, f"file:{number}") for number, one in enumerate(fields, 1)]
    return read_units(records, BYTES, FORMAT, ScoredDataConfig(**settings), "data.train", kind)


def texts(data: ResponseData) -> list[str]:
    return [bytes(t for t in document.tokens.tolist() if t < 256).decode() for document in data.documents]


def trained_on(data: ResponseData) -> list[str]:
    """The tokens of each row that its mask marks, EOS as $."""
    return [
        "".join("$" if t == EOS else chr(t) for t in document.tokens[document.action_mask == 1].tolist())
        for document in data.documents
    ]


# --- ranked -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "levels"),
    [
        ({}, [2, 1, 0]),
        ({"ranks": [3, 1, 2]}, [0, 2, 1]),
        ({"ranks": [1, 1, 2]}, [1, 1, 0]),
        ({"scores": [0.1, -3, 7.5]}, [1, 0, 2]),
        ({"ranks": None, "scores": [1, 2, 2]}, [0, 1, 1]),
        ({"ranks": [2, 2, 1], "scores": [0.0, 0.1, 9.0]}, [0, 0, 1]),
        ({"ranks": np.array([2, 1, 3])}, [1, 2, 0]),
        ({"scores": [np.float32(0.5), np.int64(2), True]}, [0, 2, 1]),
        ({"scores": (1, 2, 3), "responses": np.array(["a", "bb", "ccc"], dtype=object)}, [0, 1, 2]),
        ({"scores": [1e9, 1e9 + 1, 1e9 - 1]}, [1, 2, 0]),
        ({"scores": [0.1, 0.1 + 1e-12, 0.1]}, [0, 1, 0]),
        ({"ranks": [10**9 + 1, 10**9, 1]}, [0, 1, 2]),
        ({"scores": [1e300, -1e300, 1e100]}, [2, 0, 1]),
    ],
    ids=str,
)
def test_a_list_is_ordered_by_ranks_by_scores_or_as_it_stands(more: dict[str, Any], levels: list[float]) -> None:
    data = read("ranking", {**LIST, **more})
    assert texts(data) == ["qa", "qbb", "qccc"]
    assert trained_on(data) == ["a$", "bb$", "ccc$"]
    assert data.per_row["level"].tolist() == levels
    assert len(data) == 1
    assert data.per_unit == 3


def test_pairs_and_lists_stand_beside_each_other_with_their_margins() -> None:
    data = read("ranking", {**PAIR, "margin": 0.5}, LIST, {**LIST, "margin": np.float64(2)}, {**PAIR, "margin": None})
    assert len(data) == 4
    rows = data.take(torch.tensor([2, 0]))
    assert rows["unit"].tolist() == [0, 0, 0, 1, 1]
    assert rows["margin"].tolist() == [2, 2, 2, 0.5, 0.5]
    assert rows["level"].tolist() == [2, 1, 0, 1, 0]
    assert data.per_row["margin"].tolist() == [0.5] * 2 + [0] * 3 + [2] * 3 + [0] * 2


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_a_conversation_as_prompt_takes_texts_messages_and_whole_conversations(key: str) -> None:
    forms: list[list[Any]] = [["a", "b"], [said("a"), said("b")], [[*ASKED, *said("a")], [*ASKED, *said("b")]]]
    for responses in forms:
        data = read("ranking", {key: ASKED, "responses": responses})
        assert texts(data) == ["u:q;a:a;", "u:q;a:b;"]
        assert [one.rstrip("$") for one in trained_on(data)] == ["a;", "b;"]
    data = read("regression", {key: ASKED, "completion": [*ASKED, *said("a")], "score": 1})
    assert texts(data) == ["u:q;a:a;"]
    data = read("steps", {key: ASKED, "steps": ["one", "two"], "labels": [1, 0]})
    assert texts(data) == ["u:q;a:one\ntwo;"]


# --- scored -----------------------------------------------------------------------------------------------------------


def test_scores_stand_beside_one_response_or_a_list() -> None:
    data = read(
        "regression", SCORED, {**LIST, "scores": [1, 2.5, -3]}, {"prompt": "q", "responses": ["z"], "scores": [0]}
    )
    assert texts(data) == ["qx", "qa", "qbb", "qccc", "qz"]
    assert data.per_row["target"].tolist() == [0.5, 1, 2.5, -3, 0]
    assert len(data) == 5
    assert read("regression", {**SCORED, "score": np.float32(0.25)}).per_row["target"].tolist() == [0.25]
    assert read("regression", {**SCORED, "score": True}).per_row["target"].tolist() == [1]
    assert len(read("regression", SCORED, SCORED)) == 2  # the same response may come twice


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_scored_at_its_last_token() -> None:
    data = read("steps", STEPS, {"prompt": "q", "steps": ["only"], "labels": [0.25]})
    assert texts(data) == ["qone\ntwo", "qonly"]
    assert trained_on(data) == ["\n$", "$"]
    rows = data.take(torch.tensor([1, 0]))
    assert rows["target"][rows.action_mask == 1].tolist() == [0.25, 1, 0]
    assert not rows["target"][rows.action_mask == 0].any()
    same = read("steps", {**STEPS, "labels": np.array([True, False]), "steps": np.array(["one", "two"], dtype=object)})
    assert same.digest() == read("steps", STEPS).digest()


def test_a_step_has_the_same_tokens_wherever_it_stands() -> None:
    one, two = (read("steps", {**STEPS, "steps": steps}).documents[0].tokens for steps in (["b", "c"], ["c", "b"]))
    assert one[1:3].tolist() == [ord("b"), ord("\n")]
    assert two[1:3].tolist() == [ord("c"), ord("\n")]


def test_by_default_a_new_line_is_between_two_steps(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps(STEPS) + "\n")
    data, _ = build_preference_data(ScoredDataConfig(train=[str(file)]), BYTES, "steps")
    assert texts(data) == ["qone\ntwo"]
    data, _ = build_preference_data(ScoredDataConfig(train=[str(file)], step_separator="##"), BYTES, "steps")
    assert texts(data) == ["qone##two"]


def test_any_number_scores_a_step_where_the_loss_is_squared() -> None:
    data = read("steps_of_any_score", {**STEPS, "labels": [-1, 3.5]})
    assert data.per_token["target"][0][data.documents[0].action_mask == 1].tolist() == [-1, 3.5]
    offers = {"rm.step_loss": ["squared"], "data.on_error": ["drop"]}
    for labels in ([-1, 1], [0, 1.5]):
        with refused(DataError, key="labels", value=labels, where="file:1", offers=offers):
            read("steps", {**STEPS, "labels": labels})


# --- refusals ---------------------------------------------------------------------------------------------------------

NAN, HUGE = math.nan, 10**400
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "one response": ("ranking", {**LIST, "responses": ["a"]}, "responses"),
    "no responses": ("ranking", {**LIST, "responses": []}, "responses"),
    "a text for a list": ("ranking", {**LIST, "responses": "abc"}, "responses"),
    "a number for a response": ("ranking", {**LIST, "responses": ["a", 3]}, "responses"),
    "an empty response": ("ranking", {**LIST, "responses": ["a", ""]}, "responses"),
    "no prompt": ("ranking", {"responses": ["a", "b"]}, "prompt"),
    "an empty prompt": ("ranking", {**LIST, "prompt": ""}, "prompt"),
    "messages after a text": ("ranking", {**LIST, "responses": [said("a"), said("b")]}, "responses"),
    "a user at the end": ("ranking", {"messages": ASKED, "responses": [ASKED, said("b")]}, "responses"),
    "fewer ranks": ("ranking", {**LIST, "ranks": [1, 2]}, "ranks"),
    "one rank": ("ranking", {**LIST, "ranks": 1}, "ranks"),
    "all tied": ("ranking", {**LIST, "ranks": [2, 2, 2]}, "ranks"),
    "all scores tied": ("ranking", {**LIST, "scores": [0.5, 0.5, 0.5]}, "scores"),
    "ranks against scores": ("ranking", {**LIST, "ranks": [1, 2, 3], "scores": [1, 2, 3]}, "ranks"),
    "a rank that is NaN": ("ranking", {**LIST, "ranks": [1, NAN, 2]}, "ranks"),
    "a rank that is a text": ("ranking", {**LIST, "ranks": ["1", "2", "3"]}, "ranks"),
    "ranks that are true or false": ("ranking", {**LIST, "ranks": [True, False, False]}, "ranks"),
    "a score that is infinite": ("ranking", {**LIST, "scores": [1, math.inf, 2]}, "scores"),
    "a score that is null": ("ranking", {**LIST, "scores": [1, None, 2]}, "scores"),
    "a score beyond floats": ("ranking", {**LIST, "scores": [1, HUGE, 2]}, "scores"),
    "equal responses of two ranks": ("ranking", {**LIST, "responses": ["a", "b", "a"]}, "responses"),
    "a margin that is a text": ("ranking", {**PAIR, "margin": "0.5"}, "margin"),
    "a margin that is NaN": ("ranking", {**PAIR, "margin": np.float32(NAN)}, "margin"),
    "a margin that is true": ("ranking", {**PAIR, "margin": True}, "margin"),
    "neither pair nor list": ("ranking", {"prompt": "q"}, "chosen"),
    "half a pair": ("ranking", {"prompt": "q", "chosen": "a"}, "rejected"),
    "equal responses of a pair": ("ranking", {**PAIR, "rejected": "good"}, "chosen"),
    "half a character": ("ranking", {**LIST, "responses": ["a", "\ud800"]}, "responses"),
    "no score": ("regression", {"prompt": "q", "completion": "x"}, "score"),
    "a score that is NaN": ("regression", {**SCORED, "score": NAN}, "score"),
    "a score that is a text": ("regression", {**SCORED, "score": "0.9"}, "score"),
    "a score that is a list": ("regression", {**SCORED, "score": [0.9]}, "score"),
    "a single score beyond floats": ("regression", {**SCORED, "score": HUGE}, "score"),
    "a single score beyond float32": ("regression", {**SCORED, "score": -1.1e18}, "score"),
    "scores of a list beyond float32": ("regression", {**LIST, "scores": [1, 2, 1e31]}, "scores"),
    "a margin beyond float32": ("ranking", {**PAIR, "margin": 2e30}, "margin"),
    "a label beyond float32": ("steps_of_any_score", {**STEPS, "labels": [1, 1e39]}, "labels"),
    "orders that differ by next to nothing": (
        "ranking",
        {**LIST, "ranks": [1, 2, 3], "scores": [1e-200, 2e-200, 0]},
        "ranks",
    ),
    "no response": ("regression", {"prompt": "q", "score": 1}, "completion"),
    "an empty completion": ("regression", {**SCORED, "completion": ""}, "completion"),
    "a list without scores": ("regression", LIST, "scores"),
    "an empty list": ("regression", {**LIST, "responses": [], "scores": []}, "responses"),
    "no steps": ("steps", {**STEPS, "steps": [], "labels": []}, "steps"),
    "steps that are a text": ("steps", {**STEPS, "steps": "one two"}, "steps"),
    "an empty step": ("steps", {**STEPS, "steps": ["one", ""]}, "steps"),
    "a step that is a number": ("steps", {**STEPS, "steps": ["one", 2]}, "steps"),
    "half a character in a step": ("steps", {**STEPS, "steps": ["one", "\udfff"]}, "steps"),
    "no labels": ("steps", {"prompt": "q", "steps": ["one"]}, "labels"),
    "fewer labels": ("steps", {**STEPS, "labels": [1]}, "labels"),
    "a label that is a text": ("steps", {**STEPS, "labels": ["+", "-"]}, "labels"),
    "a label that is null": ("steps", {**STEPS, "labels": [1, None]}, "labels"),
    "steps without a prompt": ("steps", {"steps": ["one"], "labels": [1]}, "prompt"),
}
GOOD = {"ranking": PAIR, "regression": SCORED, "steps": STEPS, "steps_of_any_score": STEPS}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_from_is_refused_or_counted(name: str) -> None:
    kind, record, key = REFUSED[name]
    with refused(DataError, key=key, names=("data.on_error=drop",)) as found:
        read(kind, GOOD[kind], record)
    assert found.line.startswith("file:2: ")
    assert str(found.error.where).startswith("file:2")  # or the step within it
    data = read(kind, GOOD[kind], record, on_error="drop")
    assert (len(data), data.stats.records, str(data.stats.unusable)) == (1, 2, "file:2")


def test_a_wrong_type_under_a_key_names_the_setting_that_changes_the_key() -> None:
    for kind, record, setting in (
        ("ranking", {**LIST, "ranks": 1}, "data.ranks_key"),
        ("ranking", {**LIST, "responses": "abc"}, "data.responses_key"),
        ("regression", {**SCORED, "score": "0.9"}, "data.score_key"),
        ("steps", {**STEPS, "steps": "one"}, "data.steps_key"),
        ("steps", {**STEPS, "labels": None}, "data.labels_key"),
    ):
        with refused(DataError, names=(setting,)):
            read(kind, record)


def test_scores_of_any_magnitude_up_to_1e18_are_finite_in_training() -> None:
    data = read("regression", {**SCORED, "score": 1e18}, {**SCORED, "score": -(10**18)})
    assert data.per_row["target"].tolist() == pytest.approx([1e18, -1e18])
    assert np.isfinite(np.square(data.per_row["target"], dtype=np.float32)).all()


def test_responses_of_one_rank_may_be_equal() -> None:
    assert len(read("ranking", {**LIST, "responses": ["a", "b", "a"], "ranks": [2, 1, 2]}).documents) == 3


# --- too long ---------------------------------------------------------------------------------------------------------

LONG = {
    "ranking": {"prompt": "q", "responses": ["a" * 20, "b", "c" * 3]},
    "regression": {"prompt": "q", "completion": "x" * 20, "score": 1},
    "steps": {"prompt": "q", "steps": ["one", "t" * 20, "three"], "labels": [0.5, 1, 0]},
}


@pytest.mark.parametrize("kind", LONG)
def test_long_records_are_truncated_left_out_or_refused(kind: str) -> None:
    data = read(kind, GOOD[kind], LONG[kind], seq_length=12)
    assert str(data.stats.truncated) == "file:2"
    assert max(map(len, data.documents)) == 12
    for document, row in zip(data.documents, data.take(torch.arange(len(data))).lengths, strict=True):
        assert len(document) == row
        assert document.action_mask.any()
    if kind == "steps":  # the first step is scored, the others are cut off
        assert data.per_token["target"][1][data.documents[1].action_mask == 1].tolist() == [0.5]
    left = read(kind, GOOD[kind], LONG[kind], seq_length=12, too_long="drop")
    assert (len(left), str(left.stats.too_long)) == (1, "file:2")
    with refused(DataError, key="data.seq_length", where="file:2", offers={"data.too_long": ["truncate", "drop"]}):
        read(kind, GOOD[kind], LONG[kind], seq_length=12, too_long="error")


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("ranking", {"prompt": "q", "responses": ["a" * 20 + "b", "a" * 20 + "c", "d"]}),
        ("ranking", {**PAIR, "prompt": "q" * 20}),
        ("regression", {**SCORED, "prompt": "q" * 20}),
        ("steps", {"prompt": "q", "steps": ["t" * 20, "u"], "labels": [1, 0]}),
    ],
)
def test_a_record_of_which_nothing_can_be_learned_once_truncated_is_left_out(kind: str, record: dict[str, Any]) -> None:
    data = read(kind, GOOD[kind], record, seq_length=12)
    assert (len(data), str(data.stats.too_long)) == (1, "file:2")
    with refused(DataError, key="data.seq_length", where="data.train"):
        read(kind, record, seq_length=12)


# --- ends of conversations --------------------------------------------------------------------------------------------

LINES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = BYTES.special_tokens


@pytest.mark.parametrize("kind", ["ranking", "regression", "labelled", "pairs"])
def test_a_conversation_ends_right_after_the_end_of_its_answer(kind: str) -> None:
    """What a template writes after it is not generated, so no reward model reads it in a run."""
    record: dict[str, Any] = {"messages": ASKED, "chosen": "good", "rejected": "bad"}
    if kind == "regression":
        record = {"messages": ASKED, "responses": ["good", said("bad")], "scores": [1, 0]}
    records = [Record(record, "here")]
    lines = ResponseFormat(chat_template=LINES, settable=tuple(SETTABLE))
    data = read_units(records, BYTES, lines, ScoredDataConfig(), "data.eval", kind)
    question = [SPECIAL["<|user|>"], *b"q", SPECIAL["<|end|>"], *b"\n", SPECIAL["<|assistant|>"]]
    wanted = [[*question, *answer, SPECIAL["<|end|>"]] for answer in (b"good", b"bad")]
    assert [document.tokens.tolist() for document in data.documents] == wanted
    assert [int(document.action_mask.sum()) for document in data.documents] == [5, 4]


def test_an_end_that_the_template_does_not_write_is_not_added() -> None:
    lines = ResponseFormat(chat_template=LINES.replace("<|end|>", ""), settable=tuple(SETTABLE))
    records = [Record({"messages": ASKED, "responses": ["good", "bad"]}, "here")]
    data = read_units(records, BYTES, lines, ScoredDataConfig(), "data.train", "ranking")
    assert trained_on(data) == ["good", "bad"]
    assert [chr(document.tokens[-1]) for document in data.documents] == ["d", "d"]


def test_the_last_step_after_a_conversation_ends_as_its_answer_would() -> None:
    lines = ResponseFormat(chat_template=LINES, settable=tuple(SETTABLE))
    records = [Record({"messages": ASKED, "steps": ["one", "two"], "labels": [1, 0]}, "here")]
    (document,) = read_units(records, BYTES, lines, ScoredDataConfig(), "data.train", "steps").documents
    assert document.tokens.tolist()[-8:] == [*b"one\ntwo", SPECIAL["<|end|>"]]
    assert np.flatnonzero(document.action_mask).tolist() == [len(document) - 5, len(document) - 1]
