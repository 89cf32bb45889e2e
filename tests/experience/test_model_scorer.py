"""A reward model reads the same tokens in its training, of a policy's ids, of text and over HTTP; what it cannot read
gets no score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.data.prompts import Prompt
from megarl.data.responses import ResponseFormat
from megarl.data.sources import Record
from megarl.errors import DataError, NumericsError
from megarl.experience import model_scorer
from megarl.experience.http_scorer import HttpScorer
from megarl.experience.model_scorer import ModelScorer
from megarl.rollout.requests import Rollout
from megarl.serving.questions import read_question
from megarl.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer
from tests.chat import templates
from tests.refusals import refused
from tests.test_tokenizers import make_hugging_face

BYTES = ByteTokenizer()
ASKED = ({"role": "user", "content": "hello"},)
ANSWER = "are you"
CHATML = templates.CHATML
TEMPLATES = {
    "text after the end marker": CHATML,
    "EOS": CHATML.replace("<|im_end|>\n", "</s>"),
    "an end of two tokens": CHATML.replace("<|im_end|>", "<|im_end|></s>"),
    "no end": CHATML.replace("<|im_end|>\n", "\n\n"),
    "marks around the text alone": CHATML.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    ),
    "marks around all": CHATML.replace(
        "{{ m.content }}<|im_end|>\n", "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    ),
    "another turn after the answer": CHATML
    + "{% if not add_generation_prompt %}<|im_start|>system\nbye<|im_end|>{% endif %}",
    "an end that is text": CHATML.replace("<|im_end|>", "###"),
    "none of its own": None,
}


class Reading(ModelScorer):
    """A scorer that remembers what its model is given. The score is the number of tokens."""

    read: Sequence[Sequence[int]] = ()
    score_of_all: float | None = None

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        self.read = sequences
        return torch.tensor([self.score_of_all or len(one) for one in sequences], dtype=torch.float64)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a scorer of a model with a tokenizer, for a policy with another."""
    monkeypatch.setattr(model_scorer, "weights_digest", lambda engine: "weights")

    def made(
        tokenizer: tuple[str, str | None],
        policy: Tokenizer,
        *,
        template: str | None = None,
        longest: int = 99,
        **more: Any,
    ) -> Reading:
        source: Any = SimpleNamespace(
            tokenizer=tokenizer,
            chat_template=template,
            model=SimpleNamespace(max_positions=longest, encoder=more.pop("encoder", None)),
            vocab_size=more.pop("vocab_size", 400),
            score_reads_eos=True,
            score_moments=None,
        )
        engine: Any = None
        return Reading(engine, source, policy, per_microbatch=1, **more)

    return made


def rollout(prompt: Sequence[int], response: Sequence[int], ends: str, number: int = 0) -> Rollout:
    return Rollout(number, 0, list(prompt), list(response), [0.0] * len(response), ends)


def in_process(scorer: Reading, one: Rollout, prompt: Prompt) -> list[int]:
    scores = scorer.score([prompt], [one], stream=0, phase=0)
    assert scores.values == [len(scorer.read[0])]
    return list(scorer.read[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_same_tokens_in_training_in_process_and_over_http(
    name: str, reading: Any, tmp_path: Path
) -> None:
    kind = ("huggingface", make_hugging_face(tmp_path, chat_template=TEMPLATES[name]))
    own = build_tokenizer(*kind)
    record = Record({"messages": [*ASKED], "chosen": ANSWER, "rejected": "no"}, "here")
    trained = ResponseFormat().pair(record, own)[0].tokens.tolist()
    assert trained[len(trained) - len(own.answer_end()) :] == [*own.answer_end()] or name.startswith("marks")
    assert trained[: len(trained) - len(own.answer_end())] == [
        *own.encode_chat_prompt(ASKED),
        *own.encode(ANSWER),
    ] or name.startswith("marks")
    stop = ["###"]
    prompt = Prompt("hello", tuple(own.encode_chat_prompt(ASKED)), {}, messages=ASKED)
    said = own.encode(ANSWER)
    ends = {"length": said, "stop": [*said, *own.encode("###")]}
    if name != "an end that is text":
        ends["eos"] = [*said, *(own.answer_end() or [own.eos_id])]
    for reason, response in ends.items():
        scorer = reading(kind, own, stop=stop)
        assert in_process(scorer, rollout(prompt.tokens, response, reason), prompt) == trained, reason
    in_bytes = Prompt("hello", tuple(BYTES.encode_chat_prompt(ASKED)), {}, messages=ASKED)
    response = [*BYTES.encode(ANSWER), BYTES.eos_id]
    scorer = reading(kind, BYTES)
    assert in_process(scorer, rollout(in_bytes.tokens, response, "eos"), in_bytes) == trained, "as text"
    body = json.dumps({"conversations": [ASKED], "outputs": [ANSWER]}).encode()
    assert read_question(body, scorer.reader, 9) == [trained], "over HTTP"


def test_a_text_has_the_same_tokens_in_training_in_process_and_over_http(reading: Any, tmp_path: Path) -> None:
    kind = ("huggingface", make_hugging_face(tmp_path, chat_template=CHATML, bos=True))
    own = build_tokenizer(*kind)
    record = Record({"prompt": "hello", "chosen": ANSWER, "rejected": "no"}, "here")
    trained = ResponseFormat().pair(record, own)[0].tokens.tolist()
    scorer = reading(kind, own)
    prompt, said = Prompt("hello", tuple(own.encode_prompt("hello")), {}), own.encode(ANSWER)
    for reason, end in (("eos", [own.eos_id]), ("eos", [own.stop_ids()[-1]]), ("length", [])):
        assert in_process(scorer, rollout(prompt.tokens, [*said, *end], reason), prompt) == trained
    body = json.dumps({"prompts": ["hello"], "outputs": [ANSWER]}).encode()
    assert read_question(body, scorer.reader, 9) == [trained]


def test_a_policy_that_begins_texts_otherwise_is_read_as_text(reading: Any, tmp_path: Path) -> None:
    with_bos, without = (
        ("huggingface", make_hugging_face(tmp_path / str(bos), chat_template=CHATML, bos=bos)) for bos in (True, False)
    )
    policy, own = build_tokenizer(*without), build_tokenizer(*with_bos)
    prompt = Prompt("hello", tuple(policy.encode_prompt("hello")), {})
    scorer = reading(with_bos, policy)
    one = rollout(prompt.tokens, [*policy.encode(ANSWER), policy.eos_id], "eos")
    scores = scorer.score([prompt], [one], stream=0, phase=0)
    assert list(scorer.read[0]) == [own.bos_id, *one.tokens]
    assert scores.reencoded == 1


def test_ids_that_the_model_does_not_have_are_read_as_text(reading: Any) -> None:
    """A policy's vocabulary may be larger than its tokenizer's."""
    scorer = reading(("bytes", None), BYTES, vocab_size=BYTES.size)
    prompt = Prompt("p", tuple(b"p"), {})
    responses = [[*b"ab", BYTES.eos_id], [*b"a", 300, *b"b", BYTES.eos_id]]
    rollouts = [rollout(b"p", response, "eos") for response in responses]
    scores = scorer.score([prompt], rollouts, stream=0, phase=0)
    assert scorer.read == [[*b"pab", BYTES.eos_id]] * 2
    assert scores.reencoded == 1


# --- stop texts -------------------------------------------------------------------------------------------------------


class Pairs(ByteTokenizer):
    """Bytes, and a token for the two bytes of `!#`."""

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([byte for token in ids for byte in ((33, 35) if token == 300 else (token,))])


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ([*b"ab##"], b"ab"),
        ([*b"##"], b""),
        ([*b"ab#", 300], b"ab#!#"),  # no stop text, whatever the reason says
        ([*b"ab", 300, *b"#"], b"ab!"),  # a token across the beginning of the stop text
        ([*b"ab\n\nHuman: "], b"ab"),
        ([*b"ab##\n\nHuman:"], b"ab"),  # the first one ended it
    ],
)
def test_a_stop_text_is_not_read(response: list[int], read: bytes, reading: Any) -> None:
    stop = ["##", "\n\nHuman:"]
    scorer = reading(("bytes", None), Pairs(), stop=stop)
    scorer.reads_ids[False] = True
    prompt = Prompt("p", tuple(b"p"), {})
    assert (
        scorer.policy_tokenizer.decode(in_process(scorer, rollout(b"p", response, "stop"), prompt))
        == "p" + read.decode()
    )
    assert scorer.read[0][-1] == BYTES.eos_id
    scorer.reads_ids[False] = False
    assert in_process(scorer, rollout(b"p", response, "stop"), prompt) == [*b"p", *read, BYTES.eos_id]
    kept = in_process(scorer, rollout(b"p", response, "length"), prompt)
    assert BYTES.decode(kept) == "p" + Pairs().decode(response), "it did not end there"


# --- what cannot be read ----------------------------------------------------------------------------------------------

LONG = [rollout([*b"p"], [*text, BYTES.eos_id], "eos", number) for number, text in enumerate((b"a", b"b" * 50, b"c"))]
PROMPTS = [Prompt("p", tuple(b"p"), {}, where=f"file:{number}") for number in range(3)]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_response_that_is_too_long_is_dropped_and_counted(as_text: bool, reading: Any) -> None:
    scorer = reading(("bytes", None), BYTES, longest=20, drops=True)
    scorer.reads_ids[False] = not as_text
    scores = scorer.score(PROMPTS, LONG, stream=0, phase=0)
    assert scores.values == [3.0, None, 3.0]
    assert (scores.dropped, scores.failed_calls) == (1, 1)
    none = scorer.score(PROMPTS, LONG[1:2], stream=0, phase=0)
    assert none.values == [None]


def test_a_response_that_is_too_long_is_an_error_otherwise(reading: Any) -> None:
    scorer = reading(("bytes", None), BYTES, longest=20)
    with refused(DataError, key="reward.model", value=51, where="file:1", offers={"reward.calls.on_error": ["drop"]}):
        scorer.score(PROMPTS, LONG, stream=0, phase=0)


def test_a_score_that_is_no_number_ends_the_run_whatever_is_dropped(reading: Any) -> None:
    scorer = reading(("bytes", None), BYTES, longest=20, drops=True)
    scorer.score_of_all = float("nan")
    with refused(NumericsError, key="reward.model", where="file:0"):
        scorer.score(PROMPTS, LONG, stream=0, phase=0)


def test_a_stop_text_is_not_sent_to_a_server() -> None:
    scorer = object.__new__(HttpScorer)
    sent: list[Any] = []
    servers: Any = SimpleNamespace(servers=[None], score=lambda calls: sent.extend(calls) or [])
    scorer.servers, scorer.stop, scorer.tokenizer, scorer.batch_size = servers, ["##"], BYTES, None
    assert list(scorer._score(PROMPTS[:2], [rollout(b"p", b"ab##", "stop"), rollout(b"p", b"ab##", "length")])) == []
    assert [entry.output for entry in sent[0]] == ["ab", "ab##"]
