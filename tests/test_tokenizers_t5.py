"""T5's tokenizers: the ids of transformers, prompts that end with EOS once, and sentinels in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megarl.config.sections.model import EncoderConfig, ModelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.models.exchange.export import write_folder
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.source import tokenizer_of as files_of
from megarl.tokenizers import Tokenizer, build_tokenizer, load_tokenizer, tokenizer_of
from megarl.tokenizers.base import last_turn
from tests.chat.templates import CHATML
from tests.t5_tokenizer import SENTINELS, TEXTS, save_model, save_pieces, save_tokenizer

SPANS = "the <extra_id_0> sat on <extra_id_1> mat <extra_id_2>"
WRITTEN = [*TEXTS, "  two  spaces and\ta tab\nnew line ", "Ünknown 字", SPANS, ""]


class Config:
    """The sections of a run that decide its tokenizer."""

    def __init__(self, path: Path, kind: str = "huggingface") -> None:
        self.tokenizer = TokenizerConfig(kind=kind, path=str(path))
        self.model = ModelConfig(encoder=EncoderConfig(num_layers=1), position="relative")


@pytest.fixture(scope="module", params=["tokenizer.json", "spiece.model"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in the form that is fast to load, and in the one that T5 was published in."""
    folder = tmp_path_factory.mktemp("t5")
    (save_tokenizer if request.param == "tokenizer.json" else save_pieces)(folder)
    assert (folder / request.param).is_file()
    return folder


@pytest.fixture
def ours(folder: Path) -> Tokenizer:
    return tokenizer_of(Config(folder))


@pytest.fixture
def theirs(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", WRITTEN)
def test_a_prompt_has_the_ids_that_transformers_gives_an_encoder(
    text: str, ours: Tokenizer, theirs: PreTrainedTokenizerBase
) -> None:
    assert ours.encode_prompt(text) == theirs(text).input_ids
    assert [*ours.encode(text), ours.eos_id] == theirs(text_target=text).input_ids


def test_special_tokens_are_where_t5_has_them(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    """Padding is also the decoder's start token."""
    assert (ours.pad_id, ours.eos_id, ours.bos_id, ours.adds_bos) == (0, 1, None, False)
    assert ours.size == len(theirs)
    assert ours.stop_ids() == (1,)
    assert ours.decode([0, *ours.encode("a good film"), 1]) == "a good film"


def test_an_eos_that_a_text_ends_with_is_not_written_twice(ours: Tokenizer) -> None:
    assert ours.encode_prompt("the cat</s>") == ours.encode_prompt("the cat") == [*ours.encode("the cat"), 1]
    inside = ours.encode_prompt("the cat</s> sat")
    assert (inside.count(1), inside[-1]) == (2, 1)


def test_sentinels_come_through(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    """Other special tokens do not, such as the EOS between them."""
    ids = ours.encode(SPANS)
    sentinels = [theirs.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(SENTINELS)]
    assert sentinels == sorted(sentinels, reverse=True)
    assert [token for token in ids if token in sentinels] == sentinels[:3]
    text = ours.decode([0, *ids, 1])
    assert all(f"<extra_id_{number}>" in text for number in range(3))
    assert ours.encode(text) == ids
    assert "</s>" not in text
    assert ours.decode([ours.size, ours.size + 1, sentinels[0]]) == "<extra_id_0>", "ids beyond the tokenizer"


def test_text_without_sentinels_is_decoded_as_by_transformers(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    for text in TEXTS:
        ids = [0, *ours.encode(text), 1]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


def test_a_saved_tokenizer_loads_as_the_same(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == ours.fingerprint()
    assert [again.encode(text) for text in WRITTEN] == [ours.encode(text) for text in WRITTEN]


@pytest.mark.parametrize("form", ["tokenizer.json", "spiece.model"])
def test_a_converted_model_keeps_its_tokenizer(form: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    if form == "spiece.model":
        (tmp_path / "model" / "tokenizer.json").unlink()
        save_pieces(tmp_path / "model")
    write_folder(open_source(tmp_path / "model"), tmp_path / "again")
    found = files_of(tmp_path / "again")
    assert found is not None
    assert (
        build_tokenizer(*found).fingerprint() == build_tokenizer("huggingface", str(tmp_path / "model")).fingerprint()
    )


def test_the_sentencepiece_file_alone_has_the_same_ids_but_no_sentinels(tmp_path: Path) -> None:
    processor, whole = save_pieces(tmp_path), tokenizer_of(Config(tmp_path))
    alone = tokenizer_of(Config(tmp_path / "spiece.model", kind="sentencepiece"))
    assert alone.size == processor.get_piece_size() == whole.size - SENTINELS
    assert alone.encode_prompt(TEXTS[0]) == whole.encode_prompt(TEXTS[0])
    assert (alone.eos_id, alone.pad_id, alone.adds_bos) == (1, 0, False)


# --- conversations ----------------------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "the cat"}]
TALK = [*ASKED, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]
ANSWER = {"role": "assistant", "content": "the mat"}


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("messages", [ASKED, TALK])
def test_the_last_answer_of_a_conversation_is_the_response_to_what_generation_reads(
    template: str | None, messages: list[dict[str, str]], ours: Tokenizer
) -> None:
    tokens, marks = ours.encode_chat([*messages, ANSWER], template)
    prompt = ours.encode_chat_prompt(messages, template)
    assert prompt[-1] == ours.eos_id
    assert tokens[: len(prompt)] == prompt
    assert marks.index(1) == last_turn(marks) == len(prompt)
    answered, also = ours.encode_answered([*messages, ANSWER], template)
    assert (answered, also) == (tokens[: len(answered)], marks[: len(answered)])
    assert ours.decode(answered[len(prompt) :]).startswith("the mat")


@pytest.mark.parametrize(
    ("marks", "start"), [([0, 1, 1, 0, 0, 1, 1], 5), ([0, 1, 1, 0, 0], 1), ([1, 1], 0), ([0, 0], 2), ([], 0)]
)
def test_the_last_turn_is_the_last_run_of_marks(marks: list[int], start: int) -> None:
    assert last_turn(marks) == start
