"""Text that is shown token by token: its parts are the text of all tokens, and no part ends within a character."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer
from megarl.tokenizers.streaming import StreamedText
from tests.test_tokenizers import make_hugging_face

TEXTS = ("the cat sat", " on  the\nmat", "naïve 中文字 — 👩‍👩‍👧 ok", "dogs 🐕🐕 ate\ttea")


def byte_level(folder: Path) -> Tokenizer:
    return build_tokenizer("huggingface", make_hugging_face(folder / "bpe"))


def sentencepiece(folder: Path) -> Tokenizer:
    from sentencepiece import SentencePieceTrainer

    (folder / "text.txt").write_text("the cat sat on the mat\nthe dog ate the hat\n" * 20)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tiny"), vocab_size=272, byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    return build_tokenizer("sentencepiece", str(folder / "tiny.model"))


TOKENIZERS: list[Callable[[Path], Tokenizer]] = [lambda folder: ByteTokenizer(), byte_level, sentencepiece]


def parts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = StreamedText(tokenizer.decode)
    return [*map(stream.add, tokens), stream.end()]


@pytest.mark.parametrize("make", TOKENIZERS, ids=["bytes", "byte-level BPE", "SentencePiece"])
def test_the_parts_are_the_whole_text_and_whole_characters(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        shown = parts(tokenizer, tokens)
        assert "".join(shown) == tokenizer.decode(tokens)
        assert "\ufffd" not in "".join(shown)
        assert sum(map(bool, shown)) > 3  # not all at the end


def test_a_character_of_several_tokens_is_shown_with_its_last() -> None:
    tokens = list("a中!".encode())
    assert parts(ByteTokenizer(), tokens) == ["a", "", "", "中", "!", ""]


def test_sentencepieces_spaces_stay_between_words_alone(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    tokens = tokenizer.encode("the cat sat on the mat")
    assert "".join(parts(tokenizer, tokens)) == "the cat sat on the mat"


@pytest.mark.parametrize("make", TOKENIZERS, ids=["bytes", "byte-level BPE", "SentencePiece"])
def test_text_longer_than_a_window_is_whole(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    text = " ".join(TEXTS) * 20
    tokens = tokenizer.encode(text)
    assert len(tokens) > 600
    assert "".join(parts(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_bytes_that_are_no_text_are_shown_like_the_whole() -> None:
    draw = random.Random(0)
    for _ in range(20):
        tokens = [draw.randrange(262) for _ in range(100)]
        assert "".join(parts(ByteTokenizer(), tokens)) == ByteTokenizer().decode(tokens)


def test_a_cut_off_character_is_shown_at_the_end() -> None:
    tokens = list("a中".encode())[:-1]
    assert parts(ByteTokenizer(), tokens) == ["a", "", "", "\ufffd"]
