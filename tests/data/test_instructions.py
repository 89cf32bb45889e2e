"""Records of instructions with inputs and outputs, read as prompts, completions and judged responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl import logging as messages
from megarl.config.sections.data import LabelledDataConfig, PromptDataConfig, ScoredDataConfig
from megarl.data.dataset import SFTDataset
from megarl.data.formats import Document, RecordFormat
from megarl.data.pairs import read_units
from megarl.data.prompts import PromptLimits, read_prompts
from megarl.data.responses import ResponseFormat
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

BYTES = ByteTokenizer()
ROOMY = PromptLimits(context=1024, max_new_tokens=8, vocab_size=BYTES.size)
TASK = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
ABOUT = {"instruction": "Translate.", "input": "bleu", "output": "blue"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def parts(document: Document) -> tuple[str, str]:
    """The text of a document that is not trained on, and the text that is, where $ is EOS."""
    trained = document.action_mask.astype(bool)
    prompt, response = document.tokens[~trained].tolist(), document.tokens[trained].tolist()
    assert response[-1] == BYTES.eos_id
    return BYTES.decode(prompt), BYTES.decode(response[:-1]) + "$"


def fine_tuned_on(record: dict[str, Any], **keys: str) -> tuple[str, str]:
    return parts(RecordFormat(**keys).document(Record(record, "tasks.jsonl:4"), BYTES))


def judged(kind: str, record: dict[str, Any], data: LabelledDataConfig | ScoredDataConfig) -> list[tuple[str, str]]:
    found = read_units([Record(record, "tasks.jsonl:4")], BYTES, ResponseFormat(), data, "data.eval", kind)
    assert found.stats.transcripts.count == 0
    return [parts(document) for document in found.documents]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (TASK, ("Name a colour.\n\n", "Blue.$")),
        (ABOUT, ("Translate.\n\nbleu\n\n", "blue$")),
        ({**ABOUT, "input": None}, ("Translate.\n\n", "blue$")),
        ({"instruction": "Say yes.", "output": "yes"}, ("Say yes.\n\n", "yes$")),
        ({**ABOUT, "prompt": None, "completion": None, "messages": None}, ("Translate.\n\nbleu\n\n", "blue$")),
        ({**TASK, "completion": "Red."}, ("Name a colour.\n\n", "Red.$")),
        ({**TASK, "text": "### Instruction: Name a colour."}, ("Name a colour.\n\n", "Blue.$")),
    ],
)
def test_the_output_is_trained_on_after_instruction_and_input(record: dict[str, Any], expected: Any) -> None:
    assert fine_tuned_on(record) == expected
    assert fine_tuned_on(record, format="completion") == expected


def test_keys_that_are_there_come_before_an_instruction() -> None:
    assert fine_tuned_on({**TASK, "prompt": "a", "completion": "b"}) == ("a", "b$")
    assert fine_tuned_on({**TASK, "messages": TURNS})[1] == "yo$"
    own = {"prompt_key": "instruction", "completion_key": "output"}
    assert fine_tuned_on(ABOUT, **own) == ("Translate.", "blue$")


def test_a_text_is_read_where_an_instruction_has_no_output() -> None:
    document = RecordFormat().document(Record({"instruction": "a", "text": "bc"}, "tasks.jsonl:4"), BYTES)
    assert BYTES.decode(document.tokens[:-1]) == "bc"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**TASK, "instruction": 5}, {"key": "instruction", "value": 5}),
        ({**TASK, "input": ["a"]}, {"key": "input", "value": ["a"]}),
        ({**TASK, "output": None}, {"key": "output", "value": None}),
        ({**TASK, "instruction": "a\ud800"}, {"key": "instruction"}),
        ({"instruction": "a", "answer": "b"}, {"names": ("'instruction'+'output'", "instruction, answer")}),
        ({"instruction": None, "output": "b"}, {"names": ("'instruction'+'output'",)}),
    ],
)
def test_what_cannot_be_trained_on_is_named(record: dict[str, Any], expected: dict[str, Any]) -> None:
    with refused(DataError, **{"where": "tasks.jsonl:4", **expected}):
        fine_tuned_on(record)


def test_a_missing_output_is_named_where_completions_are_asked_for() -> None:
    with refused(DataError, key="output", where="tasks.jsonl:4"):
        fine_tuned_on({"instruction": "a"}, format="completion")


def read(path: Path, *records: dict[str, Any]) -> list[Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_prompts([str(path)], "train", PromptDataConfig(), BYTES, ROOMY)


def test_reward_functions_get_the_output_of_an_instruction(tmp_path: Path) -> None:
    prompts = read(tmp_path / "tasks.jsonl", TASK, ABOUT, {"prompt": "hi"})
    assert [prompt.text for prompt in prompts] == ["Name a colour.\n\n", "Translate.\n\nbleu\n\n", "hi"]
    assert prompts[1].tokens == tuple(BYTES.encode_prompt("Translate.\n\nbleu\n\n"))
    assert prompts[1].metadata == ABOUT
    assert prompts[2].metadata == dict.fromkeys(ABOUT)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "", "input": ""}, {"key": "instruction", "value": ""}),
        ({"instruction": 5}, {"key": "instruction", "value": 5}),
        ({"instruction": "a", "input": 5}, {"key": "input", "value": 5}),
        ({"instruction": "a", "prompt": 5}, {"key": "prompt", "value": 5}),
    ],
)
def test_an_instruction_that_is_no_prompt_is_named(
    record: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    with refused(DataError, where="tasks.jsonl:2", **expected):
        read(tmp_path / "tasks.jsonl", TASK, record)


@pytest.mark.parametrize(
    ("kind", "responses", "expected"),
    [
        ("pairs", {"chosen": "a", "rejected": "b"}, ["a$", "b$"]),
        ("ranking", {"chosen": "a", "rejected": "b", "output": "c"}, ["a$", "b$"]),
        ("ranking", {"responses": ["a", "b", "c"]}, ["a$", "b$", "c$"]),
        ("labelled", {"output": "a", "label": True}, ["a$"]),
        ("labelled", {"completion": "a", "label": True}, ["a$"]),
        ("regression", {"output": "a", "score": 1}, ["a$"]),
        ("regression", {"responses": ["a", "b"], "scores": [1, 2]}, ["a$", "b$"]),
    ],
)
def test_judged_responses_follow_instruction_and_input(
    kind: str, responses: dict[str, Any], expected: list[str]
) -> None:
    data = LabelledDataConfig() if kind == "labelled" else ScoredDataConfig()
    record = {"instruction": "Do.", "input": "x", **responses}
    assert judged(kind, record, data) == [("Do.\n\nx\n\n", response) for response in expected]


def test_an_empty_instruction_is_no_prompt_of_a_pair() -> None:
    with refused(DataError, key="instruction", where="tasks.jsonl:4"):
        judged("pairs", {"instruction": "", "chosen": "a", "rejected": "b"}, ScoredDataConfig())


def test_the_log_says_once_how_instructions_are_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_seen", set())
    caplog.set_level("INFO", logger="megarl")
    for _ in range(2):
        SFTDataset([Record(TASK, "here"), Record(ABOUT, "here")], BYTES, 64)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "'instruction'" in line
    assert "docs/data.md" in line
