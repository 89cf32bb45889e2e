"""Rows of documents, their order, resuming, evaluation, and the demo set."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.config.rules import check
from megarl.config.sections.data import DataConfig
from megarl.config.sft import SFTConfig
from megarl.data.build import build_sft_data, build_train_loader
from megarl.data.dataset import PackedDataset, SFTDataset
from megarl.data.order import EvalLoader, TrainBatches, TrainLoader
from megarl.data.sources import Record
from megarl.errors import ConfigError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

EOS = 257


def make_dataset(lengths):
    """Documents of given lengths whose first byte is their number."""
    rows = [{"text": chr(number) + "x" * (length - 2)} for number, length in enumerate(lengths)]
    return SFTDataset([Record(row, "here") for row in rows], ByteTokenizer(), 128)


def config(**changes):
    data = {
        "train": [DEMO_TRAIN], "eval": [DEMO_EVAL], "options": {}, "format": "auto",
        "text_key": "text", "prompt_key": "prompt", "completion_key": "completion",
        "messages_key": "messages", "chat_template": None, "train_split": "train",
        "eval_split": "validation", "seq_length": 128, "too_long": "truncate", "loss_on": "completion",
        "pack": False, "group_by_length": False, "shuffle": True, "eval_limit": None,
    }  # fmt: skip
    trainer = {"global_batch_size": 16, "micro_batch_size": 4, "max_steps": 5}
    return SimpleNamespace(
        seed=1,
        data=SimpleNamespace(**{key: changes.get(key, value) for key, value in data.items()}),
        trainer=SimpleNamespace(**{key: changes.get(key, value) for key, value in trainer.items()}),
    )


# Rows of documents


def test_rows_are_right_padded():
    rows = make_dataset([3, 2]).take(torch.tensor([1, 0]))
    assert rows.tokens.tolist() == [[1, EOS, 0], [0, 120, EOS]]
    assert rows.action_mask.tolist() == [[0, 1, 0], [0, 1, 1]]
    assert rows.lengths.tolist() == [2, 3]
    assert rows.action_mask.dtype == torch.float32
    assert {rows.tokens.dtype, rows.lengths.dtype} == {torch.long}
    assert "segment_ids" not in rows


def test_packed_rows_number_their_documents_and_restart_positions():
    rows = PackedDataset(make_dataset([3, 2, 2, 7]), 8, seed=0, shuffle=False).take(torch.tensor([0, 1]))
    assert rows.tokens[0].tolist() == [0, 120, EOS, 1, EOS, 2, EOS]
    assert rows["segment_ids"][0].tolist() == [1, 1, 1, 2, 2, 3, 3]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    # The first token of a document is never trained on: only another document could predict it.
    assert rows.action_mask[0].tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert rows.lengths.tolist() == [7, 7]


def test_packed_segments_are_the_documents_they_came_from():
    dataset = make_dataset(np.random.default_rng(0).integers(2, 50, size=60))
    packed = PackedDataset(dataset, 64, seed=5)
    seen = []
    for index in range(len(packed)):
        row = packed.take(torch.tensor([index]))
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            tokens = row.tokens[row["segment_ids"] == segment]
            number = int(tokens[0])
            assert tokens.tolist() == dataset[number].tokens.tolist()
            assert (tokens == EOS).sum() == 1
            seen.append(number)
    assert sorted(seen) == list(range(60))


# Order


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(23, 4), (24, 4), (3, 8), (1, 2), (100, 7)])
def test_every_epoch_holds_every_row_once(rows, size, group):
    batches = TrainBatches(np.arange(rows) + 1, size, seed=7, group_by_length=group)
    stream = np.concatenate(list(islice(TrainLoader(batches), 5 * rows // size + 1)))
    epochs = [stream[epoch * rows : (epoch + 1) * rows] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows >= 23:
        assert len({tuple(epoch) for epoch in epochs}) == 5


def test_without_shuffle_the_stream_is_the_files_order():
    batches = TrainBatches(np.ones(5), 3, seed=1, shuffle=False)
    assert np.concatenate(list(islice(TrainLoader(batches), 4))).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("group", [False, True])
def test_batch_depends_on_seed_and_number_only(group):
    lengths = np.random.default_rng(0).integers(1, 99, size=50)
    stream = list(islice(TrainLoader(TrainBatches(lengths, 8, 3, group_by_length=group)), 30))
    fresh = TrainBatches(lengths, 8, 3, group_by_length=group)
    for index in (29, 0, 13, 6, 7):  # in any order, from any start
        assert fresh.batch(index).tolist() == stream[index].tolist()
    other = TrainBatches(lengths, 8, 4, group_by_length=group)
    assert other.batch(0).tolist() != stream[0].tolist()


@pytest.mark.parametrize("after", [2, 12])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_a_stream_goes_on_by_another_batch_size_where_it_was(start, after):
    """No row of an epoch is skipped or repeated, however many of the old batches there were."""
    old = TrainBatches(np.ones(50), 5, seed=3)
    new = TrainBatches(np.ones(50), after, seed=3, start=start, rows=start * 5)
    before = [old.batch(index) for index in range(start)]
    stream = np.concatenate([*before, *islice(TrainLoader(new), 100 // after + 1)])
    assert sorted(stream[:50]) == sorted(stream[50:100]) == list(range(50))


@pytest.mark.parametrize("rows", [0, 3, 13, 27])
def test_grouped_epochs_hold_every_row_once_from_any_row_on(rows):
    lengths = np.random.default_rng(0).integers(1, 99, size=30)
    stream = np.concatenate(
        list(islice(TrainLoader(TrainBatches(lengths, 4, 3, group_by_length=True, start=2, rows=rows)), 40))
    )
    first = 30 - rows
    assert sorted(stream[first : first + 30]) == list(range(30))


def test_far_batch_is_found_at_once():
    assert len(TrainBatches(np.ones(1000), 8, seed=1).batch(10**9)) == 8


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 128, size=1003)  # epochs end inside batches

    def padding(group):
        batches = islice(TrainLoader(TrainBatches(lengths, 8, 1, group_by_length=group)), 500)
        return sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in batches)

    assert padding(True) < 0.2 * padding(False)


def test_grouped_batches_come_in_mixed_order():
    lengths = np.arange(1, 257)
    means = [
        lengths[rows].mean() for rows in islice(TrainLoader(TrainBatches(lengths, 8, 1, group_by_length=True)), 32)
    ]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_grouping_without_shuffle_is_refused():
    with refused(ConfigError, key="data.group_by_length", value=True, names=("data.shuffle=false",)):
        TrainBatches(np.ones(4), 2, 1, shuffle=False, group_by_length=True)


# Loaders


@pytest.mark.parametrize("group", [False, True])
def test_resumed_stream_equals_the_uninterrupted_one(group):
    lengths = np.array([3 + number % 40 for number in range(21)])
    whole = list(islice(TrainLoader(TrainBatches(lengths, 8, 1, group_by_length=group)), 12))
    first = TrainLoader(TrainBatches(lengths, 8, 1, group_by_length=group))
    begun = list(islice(first, 5))
    resumed = TrainLoader(TrainBatches(lengths, 8, 1, group_by_length=group, start=first.batches.consumed))
    assert torch.equal(torch.stack([*begun, *islice(resumed, 7)]), torch.stack(whole))


def test_loader_ends_at_its_last_step_and_goes_on_where_it_was():
    loader = TrainLoader(TrainBatches(np.ones(20), 8, 1, start=2), 6)
    assert len(loader) == 6
    list(islice(loader, 1))
    assert len(list(loader)) == 3
    assert list(loader) == []
    with pytest.raises(TypeError):
        len(TrainLoader(TrainBatches(np.ones(20), 8, 1)))


def test_evaluation_takes_every_row_once_in_order():
    loader = EvalLoader(13, 4)
    steps = [numbers.tolist() for numbers in loader]
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    assert len(loader) == 4


# Configuration and demo set


def test_configured_data_and_loader():
    settings = config(eval_limit=10)
    train, held_out = build_sft_data(settings, ByteTokenizer())
    assert (len(train), len(held_out)) == (400, 10)
    steps = list(build_train_loader(settings, train, start=2))
    assert [len(numbers) for numbers in steps] == [16, 16, 16]


def test_configured_packing_keeps_evaluation_unpacked():
    train, held_out = build_sft_data(config(pack=True), ByteTokenizer())
    assert len(train) < 400 / 3
    numbers = next(iter(build_train_loader(config(pack=True), train)))
    assert int(train.take(numbers)["segment_ids"].max()) > 1
    assert "segment_ids" not in held_out.take(torch.tensor([0]))


def test_no_evaluation_files_means_none():
    assert build_sft_data(config(eval=[]), ByteTokenizer())[1] is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": []}, {"key": "data.train", "value": []}),
        (
            {"pack": True, "group_by_length": True},
            {"key": "data.pack", "value": True, "names": ("data.group_by_length=true",)},
        ),
        ({"group_by_length": True, "shuffle": False}, {"key": "data.group_by_length", "value": True}),
    ],
)
def test_settings_that_exclude_each_other_are_refused_before_data_is_read(changes, expected):
    with refused(ConfigError, **expected):
        check(SFTConfig(data=DataConfig(**{"train": ["a.jsonl"], **changes})), 1)


def test_a_chat_template_that_is_neither_template_nor_file_is_named():
    with refused(ConfigError, names=("data.chat_template='chatml'",)):
        build_sft_data(config(chat_template="chatml"), ByteTokenizer())


def test_demo_set_fits_and_evaluates_on_prompts_of_its_own():
    train, held_out = build_sft_data(config(too_long="error"), ByteTokenizer())
    assert (len(train), len(held_out)) == (400, 60)
    prompts = [{bytes(d.tokens[d.action_mask == 0].astype(np.uint8)) for d in s.documents} for s in (train, held_out)]
    assert not prompts[0] & prompts[1]
