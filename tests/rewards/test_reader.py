"""What a reward model reads: one end after each response, within its context and its vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.sections.model import EncoderConfig
from megarl.errors import DataError
from megarl.rewards.reader import RewardReader
from megarl.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer
from tests.chat import templates
from tests.refusals import refused
from tests.test_tokenizers import make_hugging_face

BYTES = ByteTokenizer()
ASKED = [{"role": "user", "content": "hello"}]


def reader(tokenizer: tuple[str, str | None] = ("bytes", None), **more: Any) -> RewardReader:
    key = more.pop("key", "reward.model")
    return RewardReader(reader_source(tokenizer, **more), BYTES, key=key)


def reader_source(tokenizer: tuple[str, str | None] | None, **more: Any) -> Any:
    """What a reader looks at of a stored model."""
    settings: dict[str, Any] = {"chat_template": None, "score_reads_eos": True, "vocab_size": 400, "longest": 100}
    settings |= more
    model = SimpleNamespace(max_positions=settings.pop("longest"), encoder=settings.pop("encoder", None))
    return SimpleNamespace(tokenizer=tokenizer, model=model, score_moments=None, **settings)


def chat_tokenizer(folder: Path, **options: Any) -> tuple[str, str]:
    return "huggingface", make_hugging_face(folder, **{"chat_template": templates.CHATML, **options})


def test_an_end_for_which_the_context_has_no_place_is_left_out(tmp_path: Path) -> None:
    chat = chat_tokenizer(tmp_path)
    whole = {
        "text": reader().of_text("ab", "cde", "here"),
        "conversation": reader(chat).of_messages(ASKED, "cde", "here"),
    }
    assert whole["text"] == [*b"abcde", BYTES.eos_id]
    assert whole["conversation"][-1] == build_tokenizer(*chat).stop_ids()[-1]
    for kind, tokens in whole.items():
        for longest in (len(tokens), len(tokens) - 1, len(tokens) - 2):
            one = reader(chat if kind == "conversation" else ("bytes", None), longest=longest)

            def read(one: RewardReader = one, kind: str = kind) -> list[int]:
                if kind == "text":
                    return one.of_text("ab", "cde", "here")
                return one.of_messages(ASKED, "cde", "here")

            assert one.longest < len(tokens) - 1 or one.of_ids(tokens[:3], tokens[3:-1], kind != "text", "") == read()
            if longest < len(tokens) - 1:
                with refused(DataError, key="reward.model", value=len(tokens) - 1, where="here"):
                    read()
            else:
                assert read() == tokens[:longest]


def test_an_end_that_is_not_read_makes_no_room_for_another_token() -> None:
    assert reader(score_reads_eos=False).of_text("ab", "cde", "") == [*b"abcde"]
    assert reader(score_reads_eos=False, longest=5).of_text("ab", "cde", "") == [*b"abcde"]
    with refused(DataError, value=5):
        reader(score_reads_eos=False, longest=4).of_text("ab", "cde", "")


def test_an_encoder_reads_the_prompt_with_its_end(tmp_path: Path) -> None:
    """The last answer of a conversation is the response; all before it is the prompt."""
    encoder, chat = EncoderConfig(num_layers=2), chat_tokenizer(tmp_path)
    text = reader(encoder=encoder).of_text("ab", "cde", "here")
    assert (text, text.prompt) == ([*b"ab", BYTES.eos_id, *b"cde", BYTES.eos_id], 3)
    talk = [*ASKED, {"role": "assistant", "content": "so"}, {"role": "user", "content": "and"}]
    own, one = build_tokenizer(*chat), reader(chat, encoder=encoder)
    read = one.of_messages(talk, "yes", "here")
    assert read[: read.prompt] == [*own.encode_chat_prompt(talk), own.eos_id]
    assert read == one.of_ids(read[: read.prompt], own.encode("yes"), True, "here")
    assert not one.reads_ids(own, None, False), "a policy without an encoder"
    assert one.reads_ids(one.tokenizer, None, False)


def test_a_model_without_a_tokenizer_reads_as_its_kind_does_and_leaves_the_policys_as_it_is() -> None:
    policy = ByteTokenizer()
    policy.ends_prompts = True
    assert RewardReader(reader_source(None), policy).of_text("ab", "c", "") == [*b"abc", BYTES.eos_id]
    assert policy.encode_prompt("ab") == [*b"ab", BYTES.eos_id]


def test_errors_name_the_key_that_names_the_model() -> None:
    with refused(DataError, key="model.path", where="prompts[3]"):
        reader(key="model.path", longest=4).of_text("ab", "cde", "prompts[3]")


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with refused(DataError, key="reward.model", value=BYTES.eos_id):
        reader(vocab_size=256).of_text("ab", "cde", "here")
    assert not reader(vocab_size=256).knows([1, 256])
    assert reader(vocab_size=256).knows([1, 255])


def test_ids_pass_unchanged_only_where_they_are_encoded_alike(tmp_path: Path) -> None:
    plain, bos = (chat_tokenizer(tmp_path / str(bos), bos=bos) for bos in (False, True))

    def both(one: RewardReader, tokenizer: Tokenizer, template: str | None = None) -> tuple[bool, bool]:
        return one.reads_ids(tokenizer, template, False), one.reads_ids(tokenizer, template, True)

    same = build_tokenizer(*plain)
    assert same.fingerprint() == build_tokenizer(*bos).fingerprint(), "it does not say whether texts begin with BOS"
    assert both(reader(plain), same) == (True, True)
    assert both(reader(plain), BYTES) == (False, False)
    assert both(reader(bos), same) == (False, False)
    other = templates.CHATML.replace("\n", " ")
    assert both(reader(plain), same, other) == (True, False)
    assert both(reader(plain, chat_template=other), same) == (True, False)
    assert both(reader(plain, chat_template=templates.CHATML), same) == (True, True)
    two = templates.CHATML.replace("<|im_end|>", "<|im_end|></s>")
    assert both(reader(plain, chat_template=two), same, two) == (True, False), "an end of two tokens"
    assert same.answer_end(two) == (same.special_tokens["<|im_end|>"], same.eos_id)


@pytest.mark.parametrize("reads_eos", [True, False])
def test_how_it_reads_is_part_of_its_fingerprint(reads_eos: bool) -> None:
    assert (reader(score_reads_eos=reads_eos).fingerprint == reader().fingerprint) == reads_eos
