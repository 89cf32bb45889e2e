"""The history of a chat: what of it a model reads, taking back, and its file."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarl.chat.conversation import Conversation, load, save
from megarl.data.formats import RecordFormat
from megarl.data.sources import Record
from megarl.errors import ConfigError, DataError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused


def talk(*texts: str, system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    for number, text in enumerate(texts):
        conversation.say("assistant" if number % 2 else "user", text)
    return conversation


def letters(messages: Sequence) -> list[int]:
    """A token per character."""
    return [ord(letter) for message in messages for letter in message["content"]]


def text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_the_oldest_turns_are_left_out_and_the_system_message_stays() -> None:
    conversation = talk("aaaa", "bbbb", "cccc", "dddd", "eeee", system="S")
    whole = conversation.fit(letters, 30)
    assert (text(whole.tokens), whole.left_out, whole.cut) == ("Saaaabbbbccccddddeeee", 0, 0)
    fitted = conversation.fit(letters, 15)
    assert (text(fitted.tokens), fitted.left_out, fitted.cut) == ("Sccccddddeeee", 2, 0)
    assert len(conversation.turns) == 5  # nothing is forgotten


def test_a_message_that_is_too_long_alone_keeps_its_end() -> None:
    fitted = talk("aa", "bb", "0123456789").fit(letters, 4)
    assert (text(fitted.tokens), fitted.left_out, fitted.cut) == ("6789", 2, 6)


def test_undo_takes_back_the_last_question_and_what_follows() -> None:
    conversation = talk("a", "b", "c", "d")
    assert conversation.undo() == "c"
    assert [turn["content"] for turn in conversation.turns] == ["a", "b"]
    conversation.say("user", "unanswered")
    assert conversation.undo() == "unanswered"
    assert conversation.undo() == "a"
    assert conversation.undo() is None


def test_a_saved_conversation_is_a_record_to_train_on(tmp_path: Path) -> None:
    file = save(str(tmp_path / "new" / "chat.jsonl"), [("m", talk("hi\n", "yö", system="Be brief."))])
    record = json.loads(file.read_text())
    document = RecordFormat("auto").document(Record(record, "here"), ByteTokenizer())
    trained = zip(document.tokens.tolist(), document.action_mask.tolist(), strict=True)
    assert bytes(token for token, kept in trained if kept and token < 256).decode() == "yö"
    again = load(str(file))
    assert again.messages == record["messages"]
    assert again.system == "Be brief."


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("kept")
    with refused(ConfigError, key="/save FILE", names=("chat.jsonl",)):
        save(str(file), [("m", talk("a", "b"))])
    assert file.read_text() == "kept"


def test_two_models_are_two_lines_and_a_line_is_loaded_by_its_number(tmp_path: Path) -> None:
    file = save(str(tmp_path / "two.jsonl"), [("m", talk("a", "b")), ("n", talk("a", "c"))])
    assert load(str(file), 2).turns[-1]["content"] == "c"
    with refused(DataError, where="two.jsonl:3", names=("2 conversations",)):
        load(str(file), 3)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"text": "a"}',
        '{"messages": []}',
        '{"messages": 3}',
        '{"messages": [{"role": "user"}]}',
        "\x00",
    ],
)
def test_a_file_without_conversations_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with refused(DataError, names=("bad.jsonl",)) as found:
        load(str(tmp_path / "bad.jsonl"))
    assert "\n" not in found.line


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with refused(DataError, names=("none.jsonl",)):
        load(str(tmp_path / "none.jsonl"))
