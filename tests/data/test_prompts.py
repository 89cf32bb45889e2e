"""Prompts: read from records of every kind, with what else the records hold, in an order that follows from the seed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megarl.config.rl import PromptDataConfig
from megarl.data.prompts import PhaseLoader, Prompt, read_prompts
from megarl.data.randomwalks import task
from megarl.errors import DataError
from megarl.tokenizers import ByteTokenizer, CharacterTokenizer

BYTES = ByteTokenizer()


def read(path: Path | str, *lines: Any, **keys: str) -> list[Prompt]:
    if isinstance(path, Path):
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_prompts([str(path)], "train", PromptDataConfig(**keys), BYTES)


def test_a_records_other_fields_travel_with_its_prompt(tmp_path: Path) -> None:
    prompts = read(tmp_path / "a.jsonl", {"prompt": "2+2=", "answer": 4, "tags": ["x"]}, {"prompt": "hi"})
    assert prompts == [
        Prompt("2+2=", tuple(BYTES.encode_prompt("2+2=")), {"answer": 4, "tags": ["x"]}),
        Prompt("hi", tuple(BYTES.encode_prompt("hi")), {}),
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
    ("record", "said"),
    [
        ({"text": "x", "id": 1}, "has no text under 'prompt' and no conversation under 'messages', only 'text', 'id'"),
        ({"prompt": 7}, "set data.prompt_key or data.messages_key"),
        ({}, "only nothing"),
        ({"prompt": ""}, "the prompt is empty and has no tokens"),
        ('{"prompt": "a"', "a.jsonl:2"),
    ],
)
def test_a_record_that_is_no_prompt_is_named_by_file_and_line(record: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as problem:
        read(tmp_path / "a.jsonl", {"prompt": "good"}, record)
    assert f"{tmp_path / 'a.jsonl'}:2" in str(problem.value)
    assert said in str(problem.value)


def test_text_that_the_tokenizer_refuses_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "abba"}\n{"prompt": "abc"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: 'abc' holds 'c', which is not in tokenizer.path=ab: add it"):
        read_prompts([str(path)], "train", PromptDataConfig(), CharacterTokenizer("ab"))


def test_an_empty_file_of_prompts_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: has no records"):
        read(tmp_path / "a.jsonl")


def test_the_starts_of_a_graph_are_prompts() -> None:
    """Every start of seed 1000's walks once, as the one letter that it is, with the graph that judges it."""
    prompts = read_prompts(
        ["randomwalks"], "train", PromptDataConfig(graph_seed=1000), CharacterTokenizer("abcdefghijklmnopqrstu")
    )
    assert [prompt.text for prompt in prompts] == task(1000).starts == sorted(set(task(1000).starts))
    assert prompts[0] == Prompt("b", (1,), {"graph_seed": 1000})
    assert {len(prompt.tokens) for prompt in prompts} == {1}


def phases(seed: int, count: int, start: int = 0) -> list[list[int]]:
    prompts = [Prompt("", (1,), {})] * 5
    return list(islice(iter(PhaseLoader(prompts, 3, seed, start=start)), count))


def test_phases_go_through_all_prompts_before_any_comes_again() -> None:
    drawn = [number for numbers in phases(seed=1, count=10) for number in numbers]
    assert all(sorted(drawn[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 30, 5))
    assert drawn[:5] != drawn[5:10]


def test_a_later_start_goes_on_where_an_unbroken_run_would_be() -> None:
    assert phases(seed=1, count=4, start=3) == phases(seed=1, count=7)[3:]


def test_the_seed_decides_the_order() -> None:
    assert phases(seed=1, count=5) == phases(seed=1, count=5) != phases(seed=2, count=5)
