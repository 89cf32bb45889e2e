"""Tokenizers: ids and text, chat templates in token space, and which tokens are the assistant's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.errors import ConfigError, DataError
from megarl.tokenizers import MARKER_FILE, ByteTokenizer, build_tokenizer, load_tokenizer
from tests.chat import templates
from tests.refusals import refused

PAD, EOS, SYSTEM, USER, ASSISTANT, END = range(256, 262)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "ef"},
]


def make_hugging_face(folder, *, chat_template=None, bos=False, pad=None):
    """A byte-level tokenizer with ChatML's markers, saved as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["hello world, how are you"] * 4, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        additional_special_tokens=special[2:],
        chat_template=chat_template,
    )
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("the cat sat on the mat\nthe dog ate the hat\nuser assistant end\n" * 20)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tiny"), vocab_size=275,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tiny.model"


def test_a_hugging_face_tokenizer_with_an_absurd_id_is_refused_before_work_that_grows_with_it(tmp_path):
    folder = Path(make_hugging_face(tmp_path / "tokenizer"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with refused(ConfigError, key="tokenizer.path", value=str(folder), names=(str(2**31),)):
        build_tokenizer("huggingface", str(folder))


def test_settings_that_a_hugging_face_tokenizer_cannot_encode_with_are_refused_when_it_is_built(tmp_path):
    folder = Path(make_hugging_face(tmp_path / "tokenizer"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": ["many"]}))
    with refused(ConfigError, key="tokenizer.path", value=str(folder), names=("TypeError",)):
        build_tokenizer("huggingface", str(folder))


def test_what_the_library_panics_of_is_told_in_one_line(tmp_path, monkeypatch):
    folder = make_hugging_face(tmp_path / "tokenizer")
    tokenizer = build_tokenizer("huggingface", folder)
    panic = type("PanicException", (BaseException,), {})  # as what Rust raises: no Exception

    def fail(*_, **__):
        raise panic("no entry found for key")

    monkeypatch.setattr(type(tokenizer._tokenizer), "__call__", fail)
    with refused(ConfigError, key="tokenizer.path", value=folder, names=("'x'", "no entry found for key")):
        tokenizer.encode("x")
    with refused(ConfigError, key="tokenizer.path", value=folder, names=("no entry found for key",)):
        build_tokenizer("huggingface", folder)


@pytest.mark.parametrize("messages", [3.5, "text", {"role": "user"}, None])
def test_a_conversation_that_is_no_list_is_refused(messages):
    with refused(DataError, key="messages", value=messages):
        ByteTokenizer().apply_chat_template(messages)


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé") == [104, 0xC3, 0xA9]
    assert tokenizer.decode([104, 0xC3, 0xA9, EOS, PAD, 999]) == "hé"
    assert (tokenizer.size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (262, EOS, PAD, None)


def test_text_never_becomes_a_special_byte_token():
    assert max(ByteTokenizer().encode("<|eos|><|assistant|>")) < 256


def test_built_in_template_ends_the_assistant_with_eos_and_others_with_the_end_marker():
    tokens, chosen = ByteTokenizer().encode_chat(CHAT)
    a, b, c, d, e, f = b"abcdef"
    assert tokens == [USER, a, b, END, ASSISTANT, c, EOS, USER, d, END, ASSISTANT, e, f, EOS]
    assert chosen == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]


def test_generation_prompt_ends_where_the_answer_begins():
    tokenizer = ByteTokenizer()
    prompt = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)
    assert prompt + tokenizer.encode("ef") + [EOS] == tokenizer.apply_chat_template(CHAT)


def test_jinja_template_on_bytes_turns_written_markers_into_their_tokens():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_chat(CHAT, template) == tokenizer.encode_chat(CHAT)


def test_white_space_after_the_end_marker_is_not_the_assistants():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokens, chosen = ByteTokenizer().encode_chat(CHAT[:2], template)
    assert tokens == [USER, 97, 98, END, 10, ASSISTANT, 99, END, 10]
    assert chosen == [0, 0, 0, 0, 0, 0, 1, 1, 0]


def test_template_that_rewrites_earlier_turns_is_refused():
    # The assistant's earlier turns lose their content once others follow, as reasoning templates do.
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last or m.role == 'user' else '' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with refused(DataError, key="data.chat_template", where="turn 2", offers={"data.loss_on": ["all"]}):
        ByteTokenizer().encode_chat(CHAT, template)
    tokens, chosen = ByteTokenizer().encode_chat(CHAT[:2], template)
    assert tokens[-len([99, END]) :] == [99, END]
    assert chosen[-3:] == [0, 1, 1]


def test_template_that_raises_says_why_in_one_line():
    with refused(DataError, key="data.chat_template", names=("roles must alternate",)):
        ByteTokenizer().apply_chat_template(CHAT, template="{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "user"}, {"key": "content", "value": None, "names": ("role",)}),
        ({"role": "user", "content": 3}, {"key": "content", "value": 3}),
        ("hello", {"value": "hello"}),
        (
            {"role": "judge", "content": "x"},
            {"key": "role", "value": "judge", "offers": {"role": ["system", "user", "assistant"]}},
        ),
    ],
)
def test_malformed_turns_are_named(turn, expected):
    with refused(DataError, where="turn 1", **expected):
        ByteTokenizer().apply_chat_template([turn])


def test_hugging_face_round_trip_adds_nothing(tmp_path):
    tokenizer = build_tokenizer("huggingface", make_hugging_face(tmp_path))
    ids = tokenizer.encode("hello wörld")
    assert tokenizer.decode(ids) == "hello wörld"
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10**6]) == "hello wörld"


def test_hugging_face_size_is_past_the_largest_id(tmp_path):
    import json

    folder = make_hugging_face(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    largest = max(saved["model"]["vocab"].values())
    saved["model"]["vocab"]["hole"] = largest + 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert build_tokenizer("huggingface", folder).size == largest + 101


def test_hugging_face_without_a_pad_token_pads_with_eos(tmp_path):
    tokenizer = build_tokenizer("huggingface", make_hugging_face(tmp_path))
    assert tokenizer.pad_id == tokenizer.eos_id == 1


def test_a_special_token_without_an_id_is_no_token(tmp_path):
    folder = make_hugging_face(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": ""}))
    tokenizer = build_tokenizer("huggingface", folder)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_prompt_opens_with_bos_only_where_the_tokenizer_does_so_itself(tmp_path):
    plain = build_tokenizer("huggingface", make_hugging_face(tmp_path / "plain"))
    opening = build_tokenizer("huggingface", make_hugging_face(tmp_path / "opening", bos=True))
    assert plain.encode_prompt("hello") == plain.encode("hello")
    assert opening.encode_prompt("hello") == [opening.bos_id, *opening.encode("hello")]
    assert opening.encode("hello") == plain.encode("hello")


def test_hugging_face_template_of_its_own_is_used_and_masked(tmp_path):
    tokenizer = build_tokenizer("huggingface", make_hugging_face(tmp_path, chat_template=CHATML))
    tokens, chosen = tokenizer.encode_chat(CHAT)
    start, end = 2, 3

    def piece(text):
        return tokenizer.encode(text)

    expected = [
        *((token, 0) for token in [start, *piece("user\n"), *piece("ab"), end, *piece("\n")]),
        *((token, 0) for token in [start, *piece("assistant\n")]),
        *((token, 1) for token in [*piece("c"), end]),
        *((token, 0) for token in [*piece("\n"), start, *piece("user\n"), *piece("d"), end, *piece("\n")]),
        *((token, 0) for token in [start, *piece("assistant\n")]),
        *((token, 1) for token in [*piece("ef"), end]),
        *((token, 0) for token in piece("\n")),
    ]
    assert list(zip(tokens, chosen, strict=True)) == expected


def test_hugging_face_without_a_template_falls_back_to_the_built_in_one(tmp_path):
    tokenizer = build_tokenizer("huggingface", make_hugging_face(tmp_path))
    tokens, chosen = tokenizer.encode_chat(CHAT[:2])
    prompt = tokenizer.encode("<|user|>") + tokenizer.encode("ab") + tokenizer.encode("<|end|>")
    prompt += tokenizer.encode("<|assistant|>")
    assert tokens == prompt + tokenizer.encode("c") + [tokenizer.eos_id]
    assert chosen == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))


def test_hugging_face_template_error_is_one_line(tmp_path):
    template = "{{ raise_exception('no system turns here') }}"
    tokenizer = build_tokenizer("huggingface", make_hugging_face(tmp_path, chat_template=template))
    with refused(DataError, key="data.chat_template", names=("user", "no system turns here")):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_prompts_have_the_tokens_that_training_has_before_an_answer(tmp_path, sentencepiece_model):
    chat = [*CHAT[:1], {"role": "assistant", "content": "\n\n c\n"}, *CHAT[2:]]
    for known in (
        ByteTokenizer(),
        build_tokenizer("huggingface", make_hugging_face(tmp_path, bos=True)),
        build_tokenizer("sentencepiece", str(sentencepiece_model)),
    ):
        for template in (
            None,
            CHATML,
            templates.LAST_THINKS,
            templates.SYSTEM_LAST,
            templates.NO_END,
            templates.MARKED,
        ):
            tokens, chosen = known.encode_chat(chat, template)
            starts = [at for at in range(1, len(tokens)) if chosen[at] and not chosen[at - 1]]
            assert [len(known.encode_chat_prompt(chat[:turn], template)) for turn in (1, 3)] == starts
            assert all(
                known.encode_chat_prompt(chat[:turn], template) == tokens[:at]
                for turn, at in zip((1, 3), starts, strict=True)
            )


def test_a_token_never_lies_across_the_beginning_of_an_answer(tmp_path):
    known = build_tokenizer("huggingface", make_hugging_face(tmp_path))
    template = (
        "{% for m in messages %}{{ 'hel' if loop.index0 }}{{ m.content }}{% endfor %}{{ 'hel' if messages|length < 2 }}"
    )
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "lo world"}]
    tokens, chosen = known.encode_chat(messages, template)
    assert tokens[: chosen.index(1)] == known.encode("xhel") == known.encode_chat_prompt(messages[:1], template)
    assert tokens[chosen.index(1) :] == known.encode("lo world")
    assert tokens != known.encode("xhello world")


def test_marks_are_the_mask_that_transformers_makes_of_them(tmp_path):
    known = build_tokenizer("huggingface", make_hugging_face(tmp_path, chat_template=templates.MARKED))
    chat = [*CHAT[:1], {"role": "assistant", "content": "héllo 🙂 world"}, *CHAT[2:]]
    tokens, chosen = known.encode_chat(chat)
    theirs = known._tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert (tokens, chosen) == (theirs["input_ids"], theirs["assistant_masks"])
    assert known.apply_chat_template(chat[:1], True) == known.encode_chat_prompt(chat[:1])


def test_templates_are_rendered_as_transformers_does(tmp_path):
    known = build_tokenizer("huggingface", make_hugging_face(tmp_path))
    for template in (CHATML, templates.LAST_THINKS, templates.SYSTEM_LAST, templates.EOS_AT_THE_END):
        for ask, chat in ((False, CHAT), (True, CHAT[:3])):
            theirs = known._tokenizer.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=ask, return_dict=False
            )
            assert known.apply_chat_template(chat, ask, template) == theirs


def test_generation_stops_at_eos_and_where_the_template_ends_an_answer(tmp_path):
    known = build_tokenizer("huggingface", make_hugging_face(tmp_path, chat_template=CHATML))
    assert known.stop_ids() == (1, 3)
    assert known.stop_ids(templates.SYSTEM_LAST) == (1,)
    assert known.stop_ids(templates.NO_END) == (1,)
    assert ByteTokenizer().stop_ids() == (EOS,)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (templates.LAST_THINKS, ["ends with '<|im_end|>' (token 3)", "differently once others follow"]),
        (templates.MARKED, ["marks say what is trained on"]),
        (templates.DATED, ["today is 26 Jul 2024"]),
        (templates.NO_END, ["writes no token that ends an answer"]),
        (CHATML.replace("<|im_end|>", "[end]"), [r"rollout.stop=['[end]']"]),
        (templates.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), ["not within"]),
    ],
)
def test_what_a_template_does_is_told_once(template, said, tmp_path, caplog, monkeypatch):
    from megarl import logging as ours

    monkeypatch.setattr(ours, "_seen", set())
    caplog.set_level("INFO", logger="megarl")
    known = build_tokenizer("huggingface", make_hugging_face(tmp_path))
    for _ in range(2):
        known.encode_chat(CHAT, template)
    for text in said:
        assert sum(text in record.getMessage() for record in caplog.records) == 1, caplog.text


def test_the_models_own_template_is_what_is_saved(tmp_path):
    known = build_tokenizer("huggingface", make_hugging_face(tmp_path / "a", chat_template=templates.LAST_THINKS))
    known.encode_chat(CHAT)
    known.encode_chat(CHAT, CHATML)
    known.save(tmp_path / "b")
    assert build_tokenizer("huggingface", str(tmp_path / "b"))._tokenizer.chat_template == templates.LAST_THINKS


def test_sentencepiece_round_trip_and_specials(sentencepiece_model):
    tokenizer = build_tokenizer("sentencepiece", str(sentencepiece_model))
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10**6]) == "the cat sat"
    assert tokenizer.pad_id == tokenizer.eos_id == 2  # this model defines no padding
    assert tokenizer.encode_prompt("the cat sat") == [1, *ids]
    assert tokenizer.size == 275


def test_sentencepiece_chat_marks_the_answer_and_its_eos(sentencepiece_model):
    tokenizer = build_tokenizer("sentencepiece", str(sentencepiece_model))
    tokens, chosen = tokenizer.encode_chat(
        [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    )
    answer = [*tokenizer.encode("dog"), tokenizer.eos_id]
    assert tokens[0] == tokenizer.bos_id
    assert tokens[-len(answer) :] == answer
    assert chosen == [0] * (len(tokens) - len(answer)) + [1] * len(answer)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])
def test_saved_tokenizer_loads_as_the_same(kind, tmp_path, sentencepiece_model):
    source = {
        "bytes": None,
        "sentencepiece": str(sentencepiece_model),
        "huggingface": make_hugging_face(tmp_path / "source", chat_template=CHATML, bos=True),
    }
    tokenizer = build_tokenizer(kind, source[kind])
    tokenizer.save(tmp_path / "saved")
    tokenizer.save(tmp_path / "saved")  # again, onto itself
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.kind == kind
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)


def test_fingerprint_tells_templates_and_kinds_apart(tmp_path, sentencepiece_model):
    prints = {
        ByteTokenizer().fingerprint(),
        build_tokenizer("sentencepiece", str(sentencepiece_model)).fingerprint(),
        build_tokenizer("huggingface", make_hugging_face(tmp_path / "a")).fingerprint(),
        build_tokenizer("huggingface", make_hugging_face(tmp_path / "b", chat_template=CHATML)).fingerprint(),
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        (
            "morse",
            None,
            {
                "key": "tokenizer.kind",
                "value": "morse",
                "offers": {"tokenizer.kind": ["bytes", "characters", "sentencepiece", "huggingface"]},
            },
        ),
        ("sentencepiece", None, {"key": "tokenizer.path", "value": None, "names": ("tokenizer.kind=sentencepiece",)}),
        ("sentencepiece", "/no/such.model", {"key": "tokenizer.path", "value": "/no/such.model"}),
        ("huggingface", "/no/such/folder", {"key": "tokenizer.path", "value": "/no/such/folder"}),
        ("characters", "aba", {"key": "tokenizer.path", "value": "aba"}),
    ],
)
def test_unusable_settings_are_named(kind, path, expected):
    with refused(ConfigError, **expected):
        build_tokenizer(kind, path)


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "junk.model").write_bytes(b"not a model")
    junk, empty = str(tmp_path / "junk.model"), str(tmp_path / "empty")
    with refused(ConfigError, key="tokenizer.path", value=junk, names=(junk,)):
        build_tokenizer("sentencepiece", junk)
    (tmp_path / "empty").mkdir()
    with refused(ConfigError, key="tokenizer.path", value=empty, names=(empty,)):
        build_tokenizer("huggingface", empty)


@pytest.mark.parametrize("damage", ["missing", "not JSON", "fingerprint"])
def test_a_saved_tokenizer_that_is_damaged_is_named(damage, tmp_path):
    ByteTokenizer().save(tmp_path)
    marker = tmp_path / MARKER_FILE
    if damage == "missing":
        marker.unlink()
    else:
        marker.write_text("{" if damage == "not JSON" else json.dumps({"kind": "bytes", "fingerprint": "another"}))
    where = {"missing": tmp_path, "not JSON": marker, "fingerprint": tmp_path}[damage]
    names = {"missing": (MARKER_FILE,), "not JSON": ("JSON",), "fingerprint": ()}[damage]
    with refused(ConfigError, where=str(where), names=names):
        load_tokenizer(tmp_path)


def test_import_stays_cheap():
    code = "import sys, megarl.tokenizers; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_characters_have_one_id_each(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("characters", "abc")
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.eos_id) == (5, 3, 4)
    assert tokenizer.encode("cab") == [2, 0, 1]
    assert tokenizer.decode([2, 0, 4, 1, 3]) == "cab"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("b") == [1]
    with refused(DataError, key="tokenizer.path", value="abc", names=("'d'",)):
        tokenizer.encode("bad")


def test_an_answered_conversation_ends_where_generation_would(tmp_path):
    tokenizer = build_tokenizer("huggingface", make_hugging_face(tmp_path, chat_template=CHATML))
    tokens, marks = tokenizer.encode_chat(CHAT)
    newline = tokenizer.encode("\n")
    assert tokens[-len(newline) :] == newline
    assert tokenizer.encode_answered(CHAT) == (tokens[: -len(newline)], marks[: -len(newline)])
    assert tokenizer.answer_end() == (tokens[-len(newline) - 1],) == tokenizer.stop_ids()[-1:]
    bare = CHATML.replace("<|im_end|>", "")
    tokens, marks = tokenizer.encode_answered(CHAT, bare)
    assert (tokenizer.decode(tokens[-2:]), marks[-1]) == ("ef", 1)
    assert tokenizer.answer_end(bare) == ()
    assert tokenizer.answer_end(CHATML.replace("<|im_end|>", " over")) == tuple(tokenizer.encode(" over"))
    assert len(tokenizer.answer_end(CHATML.replace("<|im_end|>", "<|im_end|></s>"))) == 2
    built_in = ByteTokenizer()
    assert built_in.encode_answered(CHAT) == built_in.encode_chat(CHAT)
    assert built_in.answer_end() == (EOS,)
