"""Samples with rewards: turns and masks by hand, z-scored returns, the cache, and one clear line for bad records."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarl.config.sections.data import OfflineDataConfig
from megarl.data import offline
from megarl.data.formats import RecordFormat
from megarl.data.offline import OfflineStore, build_store, encode_sample, open_store, paired
from megarl.data.sources import Record
from megarl.errors import DataError
from megarl.parallel.rows import Rows
from megarl.tokenizers import build_tokenizer
from tests.refusals import refused

LETTERS = build_tokenizer("characters", "abcdefg")
EOS = LETTERS.eos_id


def taken(found: OfflineStore, *numbers: int) -> Rows:
    return found.take(torch.tensor(numbers))


def assert_same(ours: Rows, theirs: Rows) -> None:
    for name, column in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], column), name


def store(samples: list[Any], rewards: list[Any], **options: Any) -> offline.OfflineStore:
    return build_store(paired(samples, rewards), LETTERS, options.pop("seq_length", 16), **options)


def encoded(sample: Any, rewards: Any) -> offline.Sample:
    (record,) = paired([sample], [rewards])
    return encode_sample(record, LETTERS, RecordFormat())


def laid_out(sample: offline.Sample) -> tuple[list[int], list[int], list[float]]:
    """tokens, mask, rewards."""
    document = sample.document
    return document.tokens.tolist(), document.action_mask.tolist(), sample.rewards.tolist()


def test_an_output_ends_with_eos_and_earns_at_it() -> None:
    tokens, mask, rewards = laid_out(encoded(["ab", "cd"], 2.5))
    assert tokens == [0, 1, 2, 3, EOS]
    assert mask == [0, 0, 1, 1, 1]
    assert rewards == [0, 0, 0, 0, 2.5]


def test_of_a_text_everything_but_the_first_token_is_chosen() -> None:
    tokens, mask, _ = laid_out(encoded("abc", 1))
    assert tokens == [0, 1, 2, EOS]
    assert mask == [0, 1, 1, 1]


def test_a_dialogue_earns_once_at_its_end_or_in_every_turn() -> None:
    turns = ["a", "b", "cd", "e"]
    assert encoded(turns, 3).rewards.tolist() == [0, 0, 0, 0, 0, 0, 3]
    dense = encoded(turns, [1, -1])
    assert dense.document.tokens.tolist() == [0, 1, EOS, 2, 3, 4, EOS]
    assert dense.document.action_mask.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert dense.rewards.tolist() == [0, 0, 1, 0, 0, 0, -1]


def test_conversations_are_samples_too() -> None:
    tokenizer = build_tokenizer("bytes", None)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    sample = encode_sample(Record({"messages": messages, "rewards": 1}, "here"), tokenizer, RecordFormat())
    spoken = [token for token, chosen in zip(*laid_out(sample)[:2], strict=True) if chosen]
    assert spoken == [*b"yo", tokenizer.eos_id]
    assert sample.rewards[-1] == 1


def test_returns_are_standardised_over_the_data_set() -> None:
    """Returns 1, 2, 6: mean 3, deviation sqrt((4 + 1 + 9) / 2) = 2.6458."""
    found = store([["a", "b"], ["a", "b"], ["a", "b", "a", "c"]], [1, 2, [4, 2]])
    rewards = taken(found, 0, 1, 2)["rewards"]
    deviation = 7**0.5
    wanted = torch.zeros(3, 6)
    wanted[0, 2], wanted[1, 2] = -2 / deviation, -1 / deviation
    wanted[2, 2], wanted[2, 5] = 4 / deviation, (2 - 3) / deviation
    assert torch.allclose(rewards, wanted)
    assert rewards.sum(1).mean() == pytest.approx(0, abs=1e-6)
    assert rewards.sum(1).std() == pytest.approx(1)


def test_a_reward_of_the_last_turn_is_the_reward_of_the_sample() -> None:
    turns = ["a", "b", "c", "d"]
    once, dense = store([turns, turns], [1, 3]), store([turns, turns], [[0, 1], [0, 3]])
    assert torch.equal(taken(once, 0, 1)["rewards"], taken(dense, 0, 1)["rewards"])


@pytest.mark.parametrize(("value", "count"), [(0.1, 1000), (1 / 3, 7), (5, 1)])
def test_equal_rewards_are_all_zero(value: float, count: int) -> None:
    found = store([["a", "b"]] * count, [value] * count)
    assert torch.equal(taken(found, *range(count))["rewards"], torch.zeros(count, 3))


def test_samples_become_rows() -> None:
    rows = taken(store([["a", "bc"], ["ab", "c"], ["a", "b"]], [0, 1, 0.5]), 2, 1, 0)
    assert rows.tokens.tolist() == [[0, 1, EOS, 0], [0, 1, 2, EOS], [0, 1, 2, EOS]]
    assert rows.action_mask.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]
    assert rows.lengths.tolist() == [3, 4, 4]
    assert rows["rewards"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, -1]]


@pytest.mark.parametrize(
    ("second", "reward", "expected"),
    [
        (["a"], 2, {"key": "samples", "value": ["a"], "names": ("1",)}),
        (["a", ""], 2, {"key": "samples", "value": ["a", ""], "where": "samples: record 2: turn 2"}),
        ("", 2, {"key": "samples", "value": ""}),
        (["", "b"], 2, {"key": "samples", "value": ["", "b"]}),
        (["a", "b"], "2", {"key": "rewards", "value": "2"}),
        (["a", "b"], None, {"key": "rewards", "value": None, "names": ("None", "1e+30")}),
        (["a", "b"], True, {"key": "rewards", "value": True}),
        (["a", "b"], float("nan"), {"key": "rewards", "names": ("nan",)}),
        (["a", "b", "a", "b"], [1, 2, 3], {"key": "rewards", "value": [1, 2, 3]}),
        (["a", "b", "c"], 2, {"key": "samples", "value": ["a", "b", "c"], "names": ("3",)}),
        (7, 2, {"key": "samples", "value": 7}),
        (["a", 3], 2, {"key": "samples", "value": ["a", 3], "names": ("list",)}),
    ],
)
def test_a_bad_record_is_refused_with_its_number(second: Any, reward: Any, expected: dict[str, Any]) -> None:
    with refused(DataError, **{"where": "samples: record 2", **expected}):
        store([["a", "b"], second], [1, reward])


def test_a_sample_without_its_reward_is_refused_with_its_number() -> None:
    with refused(DataError, key="rewards", where="samples", names=("record 2",)):
        store([["a", "b"], ["a", "b"]], [1])


def test_text_that_the_tokenizer_refuses_names_the_record() -> None:
    with refused(DataError, key="tokenizer.path", value="abcdefg", where="samples: record 1", names=("'x'",)):
        encoded(["a", "x"], 1)


@pytest.mark.parametrize("reward", [10**400, -(10**400), 1e31, 10**31, float("nan"), float("-inf"), True, "1", None])
def test_a_reward_that_float32_cannot_compute_with_is_refused(reward: Any) -> None:
    for given in (reward, [reward]):
        with refused(DataError, key="rewards", where="samples: record 1", names=("1e+30",)) as found:
            encoded(["a", "b"], given)
        assert found.error.value is reward
        assert len(found.line) < 400


def test_a_chat_that_the_assistant_opens_is_refused() -> None:
    tokenizer = build_tokenizer("bytes", None)
    messages = [{"role": "assistant", "content": "yo"}, {"role": "user", "content": "hi"}]
    with refused(DataError, key="messages", value=messages, where="data.jsonl:3"):
        encode_sample(Record({"messages": messages, "rewards": 1}, "data.jsonl:3"), tokenizer, RecordFormat())


def test_what_was_earned_beyond_a_cut_counts_at_the_last_action() -> None:
    turns = ["a", "bc", "defg", "a"]  # a b c EOS d e f g a EOS
    cut = store([turns, ["a", "b"]], [[1, 2], 0], seq_length=6)
    assert cut.lengths.tolist() == [6, 3]
    assert cut.arrays["rewards"][:6].tolist() == [0, 0, 0, 3, 0, 0]
    assert len(store([turns, ["a", "b"]], [[1, 2], 0], seq_length=6, too_long="drop")) == 1
    offers = {"data.too_long": ["truncate", "drop"]}
    with refused(DataError, key="data.seq_length", value=6, where="record 1", offers=offers):
        store([turns], [[1, 2]], seq_length=6, too_long="error")


def test_one_that_has_no_action_left_is_left_out() -> None:
    assert len(store([["abcdef", "g"], ["a", "b"]], [1, 2], seq_length=4)) == 1
    with refused(DataError, key="data.seq_length", value=4, where="data.train"):
        store([["abcdef", "g"]], [1], seq_length=4)


# --- the cache ------------------------------------------------------------------------------------------------------


def settings(folder: Path, text: str, **options: Any) -> OfflineDataConfig:
    file = folder / "train.jsonl"
    file.write_text(text)
    return OfflineDataConfig(**{"train": [str(file)], "cache": str(folder / "cache"), "seq_length": 16, **options})


LINES = "".join(json.dumps({"samples": ["a", "b" * n], "rewards": n}) + "\n" for n in (1, 2, 5))


def test_samples_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = settings(tmp_path, LINES)
    built = open_store(data, LETTERS)
    monkeypatch.setattr(offline, "build_store", None)  # not asked again
    found = open_store(data, LETTERS)
    for row in range(3):
        assert_same(taken(found, row), taken(built, row))
    assert isinstance(found.arrays["tokens"], np.memmap)  # a rank reads no more than its rows


def test_samples_that_are_left_out_are_counted_in_every_run_and_named_when_they_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = settings(tmp_path, LINES, seq_length=4, too_long="drop")
    counted = "data.train: of 3 samples, 0 were cut to data.seq_length and 1 left out"
    open_store(data, LETTERS)
    assert caplog.messages[0] == f"{counted}: {data.train[0]}:3"
    caplog.clear()
    open_store(data, LETTERS)  # from the cache
    assert [line.partition(" (")[0] for line in caplog.messages] == [counted]


@pytest.mark.parametrize(("sample", "turn"), [("\ud800", ""), (["a", "\ud800"], ": turn 2")])
def test_half_a_character_is_refused_by_its_place(sample: Any, turn: str) -> None:
    with refused(DataError, key="samples", value="\ud800", where=f"samples: record 1{turn}"):
        encoded(sample, 1)


@pytest.mark.parametrize("change", ["content", "length", "tokenizer", "encoder"])
def test_other_samples_or_settings_are_tokenised_anew(change: str, tmp_path: Path) -> None:
    open_store(settings(tmp_path, LINES), LETTERS)
    text = LINES.replace('"rewards": 5', '"rewards": 6') if change == "content" else LINES
    other = settings(tmp_path, text, **({"seq_length": 4} if change == "length" else {}))
    tokenizer = build_tokenizer("characters", "gfedcba" if change == "tokenizer" else "abcdefg")
    tokenizer.ends_prompts = change == "encoder"
    found = open_store(other, tokenizer)
    wanted = build_store(offline.read_records(other.train), tokenizer, other.seq_length)
    assert_same(taken(found, 2), taken(wanted, 2))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_a_record_that_cannot_be_used_leaves_no_store(tmp_path: Path) -> None:
    data = settings(tmp_path, LINES + '{"samples": ["a", "b"]}\n')
    with refused(DataError, key="rewards", value=None, where="train.jsonl:4", names=("data.rewards_key",)):
        open_store(data, LETTERS)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file")
    with refused(DataError, key="data.cache", value=cache, offers={"data.cache": [None]}, names=(cache,)):
        open_store(settings(tmp_path, LINES, cache=cache), LETTERS)


def test_without_a_cache_nothing_is_written(tmp_path: Path) -> None:
    before = set(os.listdir(tmp_path))  # noqa: PTH208
    open_store(settings(tmp_path, LINES, cache=None), LETTERS)
    assert set(os.listdir(tmp_path)) - before == {"train.jsonl"}  # noqa: PTH208
