"""Records to documents: ids and masks token by token, what is cut or dropped, and packing."""

import numpy as np
import pytest

from megarl.config.files import load_chat_template
from megarl.data.dataset import PackedDataset, SFTDataset
from megarl.data.formats import RecordFormat
from megarl.data.sources import Record
from megarl.errors import ConfigError, DataError
from megarl.tokenizers import ByteTokenizer, CharacterTokenizer
from tests.refusals import refused

PAD, EOS, SYSTEM, USER, ASSISTANT, END = range(256, 262)


class PaddedWithEos(ByteTokenizer):
    """A tokenizer whose padding is its EOS, as GPT-2's is made to be."""

    def __init__(self):
        super().__init__()
        self.pad_id = self.eos_id


class OpeningWithBos(ByteTokenizer):
    """A tokenizer whose texts start with BOS; the id is one that bytes do not use here."""

    bos_id = 1
    adds_bos = True


def records(*rows):
    return [Record(row, f"file:{number}") for number, row in enumerate(rows, 1)]


def dataset(*rows, seq_length=64, tokenizer=None, too_long="truncate", **keys):
    return SFTDataset(
        records(*rows), tokenizer or ByteTokenizer(), seq_length, RecordFormat(**keys), too_long, "data.train"
    )


def shown(document):
    return list(document.tokens), list(document.action_mask)


def test_text_is_trained_on_from_its_second_token_to_eos():
    assert shown(dataset({"text": "abc"})[0]) == ([97, 98, 99, EOS], [0, 1, 1, 1])


def test_completion_masks_the_prompt_and_appends_eos_as_an_action():
    document = dataset({"prompt": "ab", "completion": "cd"})[0]
    assert shown(document) == ([97, 98, 99, 100, EOS], [0, 0, 1, 1, 1])
    assert (document.tokens.dtype, document.action_mask.dtype) == (np.int32, np.uint8)


def test_eos_is_an_action_even_where_it_is_the_padding():
    document = dataset({"prompt": "ab", "completion": "c"}, tokenizer=PaddedWithEos())[0]
    assert shown(document) == ([97, 98, 99, EOS], [0, 0, 1, 1])


def test_chat_trains_on_assistant_turns_and_their_end_markers():
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b"},
    ]
    tokens, mask = shown(dataset({"messages": chat})[0])
    assert tokens == [
        SYSTEM, 115, END, USER, 117, END, ASSISTANT, 97, EOS, USER, 118, END, ASSISTANT, 98, EOS,
    ]  # fmt: skip
    assert mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


def test_loss_on_all_trains_on_everything_but_the_first_token():
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert shown(dataset({"prompt": "ab", "completion": "c"}, loss_on="all")[0])[1] == [0, 1, 1, 1]
    assert shown(dataset({"messages": chat}, loss_on="all")[0])[1] == [0, 1, 1, 1, 1, 1]


def test_bos_opens_a_sequence_once_and_is_never_trained_on():
    tokenizer = OpeningWithBos()
    assert shown(dataset({"text": "a"}, tokenizer=tokenizer)[0]) == ([1, 97, EOS], [0, 1, 1])
    document = dataset({"prompt": "a", "completion": "b"}, tokenizer=tokenizer)[0]
    assert shown(document) == ([1, 97, 98, EOS], [0, 0, 1, 1])


def test_empty_prompt_does_not_train_on_the_first_token():
    assert shown(dataset({"prompt": "", "completion": "ab"})[0]) == ([97, 98, EOS], [0, 1, 1])


def test_format_is_told_by_the_keys_of_each_record():
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    found = dataset({"text": "ab"}, {"prompt": "a", "completion": "b"}, {"messages": chat})
    assert [list(document.action_mask) for document in found.documents] == [
        [0, 1, 1],
        [0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]


def test_keys_can_be_renamed():
    found = dataset({"question": "a", "answer": "b"}, prompt_key="question", completion_key="answer")
    assert shown(found[0]) == ([97, 98, EOS], [0, 1, 1])


def test_truncation_cuts_the_end_and_drops_what_has_nothing_left_to_train_on():
    found = dataset(
        {"prompt": "ab", "completion": "cdef"}, {"prompt": "abcd", "completion": "e"},
        {"prompt": "a", "completion": "b"}, seq_length=4,
    )  # fmt: skip
    assert [shown(document) for document in found.documents] == [
        ([97, 98, 99, 100], [0, 0, 1, 1]),
        ([97, 98, EOS], [0, 1, 1]),
    ]
    stats = found.stats
    assert (stats.records, stats.kept, stats.truncated, stats.dropped_no_loss) == (3, 2, 2, 1)
    assert (stats.tokens, stats.response_tokens) == (7, 4)
    assert list(found.lengths) == [4, 3]
    assert (stats.changed.count, str(stats.changed)) == (2, "file:1, file:2")


def test_too_long_drop_counts_and_error_names_the_record():
    rows = [{"text": "ab"}, {"text": "abcdef"}]
    dropped = dataset(*rows, seq_length=4, too_long="drop")
    assert (len(dropped), dropped.stats.dropped_too_long, dropped.stats.truncated) == (1, 1, 0)
    assert str(dropped.stats.changed) == "file:2"
    with refused(
        DataError, key="data.seq_length", value=4, where="file:2", offers={"data.too_long": ["truncate", "drop"]}
    ):
        dataset(*rows, seq_length=4, too_long="error")


def test_record_of_exactly_seq_length_fits():
    assert len(dataset({"text": "abc"}, seq_length=4, too_long="error")[0]) == 4


def test_nothing_left_is_an_error_that_says_why():
    with refused(DataError, key="data.seq_length", value=4, where="data.train"):
        dataset({"prompt": "abcd", "completion": "e"}, seq_length=4)


def test_chat_without_an_assistant_is_dropped_and_counted():
    lonely = {"messages": [{"role": "user", "content": "u"}]}
    assert dataset(lonely, {"text": "ab"}).stats.dropped_no_loss == 1


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"a": 1, "b": 2}, {}, {"where": "file:1", "names": ("'messages'", "a, b", "data.text_key")}),
        (
            {"prompt": "x"},
            {"format": "completion"},
            {"key": "completion", "value": None, "where": "file:1", "names": ("data.format=completion",)},
        ),
        ({"text": 3}, {}, {"key": "text", "value": 3, "where": "file:1", "names": ("data.text_key",)}),
        (
            {"prompt": "x", "completion": None},
            {},
            {"key": "completion", "value": None, "where": "file:1", "names": ("NoneType",)},
        ),
        ({"messages": "hi"}, {}, {"key": "messages", "value": "hi", "where": "file:1"}),
        ({"messages": []}, {}, {"key": "messages", "value": [], "where": "file:1"}),
        ({"messages": [{"role": "user"}]}, {}, {"key": "content", "value": None, "where": "file:1: turn 1"}),
        ({"text": "\ud800"}, {}, {"key": "text", "value": "\ud800", "where": "file:1"}),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            {},
            {"key": "content", "value": "\ud800", "where": "file:1: turn 1"},
        ),
    ],
)
def test_bad_record_is_named_with_what_was_found(row, keys, expected):
    with refused(DataError, **expected):
        dataset(row, **keys)


@pytest.mark.parametrize("row", [{"text": "abc"}, {"prompt": "ab", "completion": "c"}])
def test_text_that_the_tokenizer_refuses_names_the_record(row):
    with refused(DataError, key="tokenizer.path", value="ab", where="file:1", names=("'c'",)):
        dataset(row, tokenizer=CharacterTokenizer("ab"))


def test_template_that_hides_the_assistants_tokens_names_the_record():
    template = "{% for m in messages %}{{ m.content }}{{ messages|length }}{% endfor %}"
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with refused(DataError, key="data.chat_template", where="turn 2", offers={"data.loss_on": ["all"]}) as found:
        dataset({"messages": chat}, chat_template=template)
    assert found.error.where == "file:1: turn 2"
    assert found.line.startswith("file:1: ")


def test_chat_template_is_a_template_a_file_or_an_error(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    assert load_chat_template(None) is None
    assert load_chat_template("{{ x }}") == "{{ x }}"
    assert load_chat_template(str(tmp_path / "t.jinja")) == "{{ messages[0].content }}"
    with refused(ConfigError, names=("data.chat_template='chatml'",)):
        load_chat_template("chatml")


def test_packed_rows_hold_whole_documents():
    documents = dataset({"text": "abc"}, {"text": "d"}, {"text": "ef"})
    packed = PackedDataset(documents, 6, seed=0, shuffle=False)
    assert [[list(d.tokens) for d in packed.row(i)] for i in range(len(packed))] == [
        [[97, 98, 99, EOS], [100, EOS]],
        [[101, 102, EOS]],
    ]
    assert list(packed.lengths) == [6, 3]
