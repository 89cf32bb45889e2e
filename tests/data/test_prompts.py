"""Prompts: read from records of every kind, with what else the records hold, in an order that follows from the seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megarl.config.sections.data import PromptDataConfig
from megarl.data.mixture import prompt_order
from megarl.data.prompts import Prompt, PromptLimits, read_prompts
from megarl.errors import ConfigError, DataError
from megarl.rollout.requests import Sampling, check_requests, repeat
from megarl.tasks.randomwalks import task
from megarl.tokenizers import ByteTokenizer, CharacterTokenizer
from tests.refusals import refused

BYTES = ByteTokenizer()
ROOMY = PromptLimits(context=1024, max_new_tokens=8, vocab_size=BYTES.size)


def read(path: Path, *lines: Any, limits: PromptLimits = ROOMY, **keys: str) -> list[Prompt]:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_prompts([str(path)], "train", PromptDataConfig(**keys), BYTES, limits)


def test_a_records_other_fields_travel_with_its_prompt_and_are_the_same_for_all(tmp_path: Path) -> None:
    prompts = read(tmp_path / "a.jsonl", {"prompt": "2+2=", "answer": 4, "tags": ["x"]}, {"prompt": "hi"})
    assert prompts == [
        Prompt("2+2=", tuple(BYTES.encode_prompt("2+2=")), {"answer": 4, "tags": ["x"]}),
        Prompt("hi", tuple(BYTES.encode_prompt("hi")), {"answer": None, "tags": None}),
    ]


def test_the_keys_may_have_other_names(tmp_path: Path) -> None:
    (prompt,) = read(tmp_path / "a.jsonl", {"question": "why", "prompt": "kept"}, prompt_key="question")
    assert (prompt.text, prompt.metadata) == ("why", {"prompt": "kept"})


def test_a_conversation_ends_with_the_turn_that_is_asked_for(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (prompt,) = read(tmp_path / "a.jsonl", {"messages": messages, "id": 7})
    assert prompt.tokens == tuple(BYTES.apply_chat_template(messages, True, None))
    assert prompt.text == BYTES.decode(prompt.tokens)
    assert "hi" in prompt.text
    assert prompt.metadata == {"id": 7}


def test_a_chat_template_of_ones_own_is_used(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    record = {"messages": [{"role": "user", "content": "hi"}]}
    (prompt,) = read(tmp_path / "a.jsonl", record, chat_template=template)
    assert prompt.text.endswith("<hi>!")


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    assert [prompt.text for prompt in read(tmp_path / "a.txt", "one", "two")] == ["one", "two"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "x", "id": 1}, {"key": "prompt", "value": None, "names": ("'messages'", "'text', 'id'")}),
        ({"prompt": 7}, {"key": "prompt", "value": 7, "names": ("data.prompt_key", "data.messages_key")}),
        ({}, {"key": "prompt", "value": None, "names": ("'messages'",)}),
        ({"prompt": ""}, {"key": "prompt", "value": ""}),
        ('{"prompt": "a"', {"names": ("JSON",)}),
        ({"prompt": "a\ud800"}, {"key": "prompt", "value": "a\ud800"}),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            {"key": "content", "value": "\ud800", "where": "a.jsonl:2: turn 1"},
        ),
        ({"messages": []}, {"key": "messages", "value": []}),
        ({"messages": 5}, {"key": "messages", "value": 5}),
        (
            {"messages": [{"role": "critic", "content": "a"}]},
            {"key": "role", "value": "critic", "where": "a.jsonl:2: turn 1"},
        ),
    ],
)
def test_a_record_that_is_no_prompt_is_named_by_file_and_line(
    record: Any, expected: dict[str, Any], tmp_path: Path
) -> None:
    with refused(DataError, **{"where": f"{tmp_path / 'a.jsonl'}:2", **expected}):
        read(tmp_path / "a.jsonl", {"prompt": "good"}, record)


def test_a_conversation_that_a_template_makes_nothing_of_is_named(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with refused(DataError, key="messages", value=messages, where="a.jsonl:1"):
        read(tmp_path / "a.jsonl", {"messages": messages}, chat_template="{{ '' }}")


def test_text_that_the_tokenizer_refuses_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "abba"}\n{"prompt": "abc"}\n')
    with refused(DataError, key="tokenizer.path", value="ab", where="a.jsonl:2", names=("'abc'", "'c'")):
        read_prompts([str(path)], "train", PromptDataConfig(), CharacterTokenizer("ab"), ROOMY)


def test_an_empty_file_of_prompts_is_refused_by_its_name(tmp_path: Path) -> None:
    with refused(DataError, key="data.train", where="a.jsonl"):
        read(tmp_path / "a.jsonl")


def test_the_starts_of_a_graph_are_prompts() -> None:
    """Every start of a seed's walks once, as the one letter that it is, with the graph that judges it."""
    prompts = read_prompts(
        ["megarl.tasks.randomwalks:prompts"],
        "train",
        PromptDataConfig(options={"seed": 1005}),
        CharacterTokenizer("abcdefghijklmnopqrstu"),
        ROOMY,
    )
    assert [prompt.text for prompt in prompts] == task(1005).starts == sorted(set(task(1005).starts))
    assert prompts[0] == Prompt("b", (1,), {"graph_seed": 1005})
    assert {len(prompt.tokens) for prompt in prompts} == {1}


# --- prompts that are too long ----------------------------------------------------------------------------------------


def limits(too_long: str, room: int = 4, vocab_size: int = BYTES.size) -> PromptLimits:
    return PromptLimits(context=room + 8, max_new_tokens=8, vocab_size=vocab_size, too_long=too_long)


MIXED = [{"prompt": "a" * length} for length in (2, 5, 4, 9, 1, 7, 6)]  # room for 2, 4 and 1


def test_a_prompt_that_is_too_long_is_refused_by_file_and_line_with_its_length_and_the_room(tmp_path: Path) -> None:
    with refused(
        DataError,
        key="rollout.max_new_tokens",
        value=8,
        where=f"{tmp_path / 'a.jsonl'}:2",
        offers={"rollout.too_long": ["truncate", "drop"]},
        names=("5", "4", "12"),
    ):
        read(tmp_path / "a.jsonl", *MIXED, limits=limits("error"))


def test_prompts_that_are_too_long_are_left_out_and_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    prompts = read(path, *MIXED, limits=limits("drop"))
    assert [(prompt.number, len(prompt.tokens)) for prompt in prompts] == [(0, 2), (2, 4), (4, 1)]
    (line,) = caplog.messages
    assert line.startswith("data.train: 4 of 7 prompts are longer than 4 tokens")
    assert line.endswith(f"left out: {path}:2, {path}:4, {path}:6 and 1 more")


def test_prompts_that_are_too_long_lose_their_beginning_and_are_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": "abcdef"}, {"prompt": "abcd"}]
    prompts = read(tmp_path / "a.jsonl", *records, limits=limits("truncate"))
    assert [(prompt.text, BYTES.decode(prompt.tokens)) for prompt in prompts] == [("abcdef", "cdef"), ("abcd", "abcd")]
    (line,) = caplog.messages
    assert line.startswith("data.train: 1 of 2 prompts are longer than 4 tokens")
    assert line.endswith(f"cut on the left: {tmp_path / 'a.jsonl'}:1")


def test_only_where_no_prompt_is_left_is_leaving_out_an_error(tmp_path: Path) -> None:
    offers = {"rollout.too_long": ["truncate"]}
    with refused(DataError, key="rollout.too_long", value="drop", where="data.train", offers=offers):
        read(tmp_path / "a.jsonl", *[{"prompt": "a" * 5}] * 2, limits=limits("drop"))


def test_a_context_that_responses_fill_is_refused() -> None:
    key = "rollout.max_new_tokens"
    with refused(ConfigError, key=key, value=8, offers={key: [7]}):
        PromptLimits(context=8, max_new_tokens=8, vocab_size=9)


def test_a_token_that_the_model_has_not_is_refused_by_file_and_line(tmp_path: Path) -> None:
    with refused(DataError, key="token", value=ord("b"), where="a.jsonl:2", names=("tokenizer.path",)):
        read(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "ab"}, limits=limits("error", vocab_size=ord("b")))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_file_every_phase_can_be_answered_or_the_run_is_refused_at_the_start(
    seed: int, tmp_path: Path
) -> None:
    """100 random files of short and long prompts each: what reading lets through, no phase can trip over."""
    dice = random.Random(seed)
    for number in range(100):
        room, new, per_phase = dice.randint(1, 12), dice.randint(1, 4), dice.randint(1, 8)
        lengths = [dice.randint(1, 2 * room) for _ in range(dice.randint(1, 20))]
        too_long = dice.choice(("error", "drop", "truncate"))
        path = tmp_path / f"{number}.jsonl"
        measured = PromptLimits(room + new, new, BYTES.size, too_long)
        usable = [index for index, length in enumerate(lengths) if length <= room or too_long == "truncate"]
        refused = len(usable) < len(lengths) if too_long == "error" else not usable
        records = [{"prompt": "x" * length} for length in lengths]
        if refused:
            with pytest.raises(DataError):
                read(path, *records, limits=measured)
            continue
        prompts = read(path, *records, limits=measured)
        assert [prompt.number for prompt in prompts] == usable
        drawn = phases(number, 40, prompts=prompts, per_phase=per_phase)
        others = [Prompt("", (1,), {})] * len(usable)
        assert drawn == phases(number, 40, prompts=others, per_phase=per_phase)
        for numbers in drawn:
            assert len(numbers) == per_phase
            requests = repeat([prompts[one].tokens for one in numbers], 2, Sampling(max_new_tokens=new))
            check_requests(requests, BYTES.size, room + new, can_decode=True)


# --- phases -----------------------------------------------------------------------------------------------------------


def phases(
    seed: int, count: int, start: int = 0, prompts: list[Prompt] | None = None, per_phase: int = 3
) -> list[list[int]]:
    prompts = prompts or [Prompt("", (1,), {})] * 5
    order = prompt_order(prompts, PromptDataConfig(), seed, 1)
    return [order.rows(phase * per_phase, per_phase, phase).tolist() for phase in range(start, start + count)]


def test_phases_go_through_all_prompts_before_any_comes_again() -> None:
    drawn = [number for numbers in phases(seed=1, count=10) for number in numbers]
    assert all(sorted(drawn[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 30, 5))
    assert drawn[:5] != drawn[5:10]


def test_a_later_start_goes_on_where_an_unbroken_run_would_be() -> None:
    assert phases(seed=1, count=4, start=3) == phases(seed=1, count=7)[3:]


def test_the_seed_decides_the_order() -> None:
    assert phases(seed=1, count=5) == phases(seed=1, count=5) != phases(seed=2, count=5)
