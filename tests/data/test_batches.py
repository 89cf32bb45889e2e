"""Batches: padding, the order of rows, shares of ranks, resuming, evaluation, and the demo set."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megarl.data.build import build_eval_loader, build_sft_data, build_train_loader
from megarl.data.collate import batch_length, collate
from megarl.data.dataset import PackedDataset, SFTDataset
from megarl.data.demo import make
from megarl.data.loaders import EvalLoader, StepLoader
from megarl.data.order import TrainBatches, shard_rows
from megarl.data.sources import Record
from megarl.errors import ConfigError
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused

PAD, EOS = 256, 257
DEMO = Path(make.__file__).parent


def make_dataset(lengths):
    """Documents of given lengths whose first byte is their number."""
    rows = [{"text": chr(number) + "x" * (length - 2)} for number, length in enumerate(lengths)]
    return SFTDataset([Record(row, "here") for row in rows], ByteTokenizer(), 128)


def make_loader(dataset, *, seed=1, start=0, steps=None, batch=8, micro=2, group=False, **layout):
    batches = TrainBatches(dataset.lengths, batch, seed, group_by_length=group, start=start)
    return StepLoader(dataset, batches, micro_batch_size=micro, seq_length=128, pad_id=PAD, steps=steps, **layout)


def config(**changes):
    data = {
        "train": [str(DEMO / "train.jsonl")], "eval": [str(DEMO / "eval.jsonl")], "format": "auto",
        "text_key": "text", "prompt_key": "prompt", "completion_key": "completion",
        "messages_key": "messages", "chat_template": None, "train_split": "train",
        "eval_split": "validation", "seq_length": 128, "too_long": "truncate", "loss_on": "completion",
        "pack": False, "group_by_length": False, "shuffle": True, "eval_limit": None,
    }  # fmt: skip
    trainer = {"global_batch_size": 16, "micro_batch_size": 4, "eval_batch_size": 8, "max_steps": 5}
    return SimpleNamespace(
        seed=1,
        data=SimpleNamespace(**{key: changes.get(key, value) for key, value in data.items()}),
        trainer=SimpleNamespace(**{key: changes.get(key, value) for key, value in trainer.items()}),
        parallel=SimpleNamespace(pp=changes.get("pp", 1)),
    )


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# Collation


def test_collated_rows_are_right_padded():
    dataset = make_dataset([3, 2])
    batch = collate([dataset.row(0), dataset.row(1), ()], 4, PAD)
    assert batch["tokens"].tolist() == [[0, 120, EOS, PAD], [1, EOS, PAD, PAD], [PAD] * 4]
    assert batch["response_mask"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3]] * 3
    assert batch["lengths"].tolist() == [3, 2, 0]
    assert batch["response_mask"].dtype == torch.float32
    assert {batch[key].dtype for key in ("tokens", "positions", "lengths")} == {torch.long}
    assert "segment_ids" not in batch


def test_padding_that_is_eos_stays_out_of_the_mask():
    dataset = make_dataset([3, 5])
    batch = collate([dataset.row(0), dataset.row(1)], 6, pad_id=EOS)
    assert batch["tokens"][0].tolist() == [0, 120, EOS, EOS, EOS, EOS]
    assert batch["response_mask"][0].tolist() == [0, 1, 1, 0, 0, 0]


def test_packed_rows_number_their_documents_and_restart_positions():
    packed = PackedDataset(make_dataset([3, 2, 2]), 8, seed=0, shuffle=False)
    batch = collate([packed.row(0)], 9, PAD, packed=True)
    assert batch["tokens"].tolist() == [[0, 120, EOS, 1, EOS, 2, EOS, PAD, PAD]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 3, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1]]
    # The first token of a document is never trained on: only another document could predict it.
    assert batch["response_mask"].tolist() == [[0, 1, 1, 0, 1, 0, 1, 0, 0]]
    assert batch["lengths"].tolist() == [7]


def test_packed_segments_are_the_documents_they_came_from():
    dataset = make_dataset(np.random.default_rng(0).integers(2, 50, size=60))
    packed = PackedDataset(dataset, 64, seed=5)
    seen = []
    for index in range(len(packed)):
        batch = collate([packed.row(index)], 64, PAD, packed=True)
        for segment in range(1, int(batch["segment_ids"].max()) + 1):
            tokens = batch["tokens"][batch["segment_ids"] == segment]
            number = int(tokens[0])
            assert tokens.tolist() == dataset[number].tokens.tolist()
            assert (tokens == EOS).sum() == 1
            seen.append(number)
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize(
    ("longest", "seq_length", "multiple_of", "expected"),
    [
        (1, 128, 1, 16),
        (16, 128, 1, 16),
        (17, 128, 1, 32),
        (120, 120, 1, 120),  # never past seq_length
        (65, 2048, 1, 128),  # steps of 2048 / 32
        (19, 96, 6, 36),  # steps of 18, the first multiple of 6 from 16 on
        (5, 8, 2, 8),
    ],
)
def test_batch_length_is_rounded_up(longest, seq_length, multiple_of, expected):
    assert batch_length(longest, seq_length, multiple_of) == expected


@pytest.mark.parametrize("seq_length", [128, 2048, 2050, 8192])
def test_a_run_meets_few_lengths(seq_length):
    assert len({batch_length(n, seq_length) for n in range(1, seq_length + 1)}) <= 32


# Order


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(23, 4), (24, 4), (3, 8), (1, 2), (100, 7)])
def test_every_epoch_holds_every_row_once(rows, size, group):
    batches = TrainBatches(np.arange(rows) + 1, size, seed=7, group_by_length=group)
    stream = np.concatenate(list(islice(batches, 5 * rows // size + 1)))
    epochs = [stream[epoch * rows : (epoch + 1) * rows] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows >= 23:
        assert len({tuple(epoch) for epoch in epochs}) == 5


def test_without_shuffle_the_stream_is_the_files_order():
    batches = TrainBatches(np.ones(5), 3, seed=1, shuffle=False)
    assert np.concatenate(list(islice(batches, 4))).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("group", [False, True])
def test_batch_depends_on_seed_and_number_only(group):
    lengths = np.random.default_rng(0).integers(1, 99, size=50)
    stream = list(islice(TrainBatches(lengths, 8, 3, group_by_length=group), 30))
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
    stream = np.concatenate([*before, *islice(new, 100 // after + 1)])
    assert sorted(stream[:50]) == sorted(stream[50:100]) == list(range(50))
    assert new.epoch(start) == start * 5 / 50


@pytest.mark.parametrize("rows", [0, 3, 13, 27])
def test_grouped_epochs_hold_every_row_once_from_any_row_on(rows):
    lengths = np.random.default_rng(0).integers(1, 99, size=30)
    stream = np.concatenate(list(islice(TrainBatches(lengths, 4, 3, group_by_length=True, start=2, rows=rows), 40)))
    first = 30 - rows
    assert sorted(stream[first : first + 30]) == list(range(30))


def test_far_batch_is_found_at_once():
    assert len(TrainBatches(np.ones(1000), 8, seed=1).batch(10**9)) == 8


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 128, size=1003)  # epochs end inside batches

    def padding(group):
        batches = islice(TrainBatches(lengths, 8, 1, group_by_length=group), 500)
        return sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in batches)

    assert padding(True) < 0.2 * padding(False)


def test_grouped_batches_come_in_mixed_order():
    lengths = np.arange(1, 257)
    means = [lengths[rows].mean() for rows in islice(TrainBatches(lengths, 8, 1, group_by_length=True), 32)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_grouping_without_shuffle_is_refused():
    with refused(ConfigError, key="data.group_by_length", value=True, names=("data.shuffle=false",)):
        TrainBatches(np.ones(4), 2, 1, shuffle=False, group_by_length=True)


# Shares


def test_shares_by_hand():
    rows = np.arange(8)
    assert [share.tolist() for share in shard_rows(rows, 0, 2, 2)] == [[0, 1], [4, 5]]
    assert [share.tolist() for share in shard_rows(rows, 1, 2, 2)] == [[2, 3], [6, 7]]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_cover_each_global_batch_exactly_once(dp_size):
    dataset = make_dataset([3 + number % 40 for number in range(30)])
    reference = TrainBatches(dataset.lengths, 8, 1)
    loaders = [make_loader(dataset, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for index, steps in enumerate(islice(zip(*loaders, strict=True), 9)):
        assert {len(microbatches) for microbatches in steps} == {8 // (2 * dp_size)}
        shapes = {batch["tokens"].shape for microbatches in steps for batch in microbatches}
        assert len(shapes) == 1  # one length for all ranks and microbatches
        in_order = [batch for together in zip(*steps, strict=True) for batch in together]
        rows = torch.cat([batch["tokens"][:, 0] for batch in in_order])
        assert rows.tolist() == reference.batch(index).tolist()


def test_batch_that_does_not_divide_names_sizes_that_do():
    key = "trainer.global_batch_size"
    with refused(ConfigError, key=key, value=8, offers={key: [6, 12]}, names=("trainer.micro_batch_size=3",)):
        shard_rows(np.arange(8), 0, 2, 3)
    with refused(ConfigError, key=key, value=8, offers={key: [6, 12]}):
        make_loader(make_dataset([4] * 9), micro=3, dp_size=2)
    with refused(ConfigError, key=key, value=4, offers={key: [6]}):
        shard_rows(np.arange(4), 0, 2, 3)


# Loaders


@pytest.mark.parametrize("group", [False, True])
def test_resumed_stream_equals_the_uninterrupted_one(group):
    dataset = make_dataset([3 + number % 40 for number in range(21)])
    whole = list(islice(make_loader(dataset, group=group), 12))
    first = make_loader(dataset, group=group)
    assert_first = list(islice(first, 5))
    assert first.consumed == 5
    resumed = make_loader(dataset, group=group, start=first.consumed)
    sought = make_loader(dataset, group=group)
    sought.seek(5)
    for loader in (resumed, sought):
        rest = list(islice(loader, 7))
        for left, right in zip(assert_first + rest, whole, strict=True):
            assert_same(left, right)


def test_loader_ends_at_its_last_step_and_goes_on_where_it_was():
    dataset = make_dataset([5] * 20)
    loader = make_loader(dataset, start=2, steps=6)
    assert len(loader) == 6
    list(islice(loader, 1))
    assert len(list(loader)) == 3
    assert list(loader) == []
    with pytest.raises(TypeError):
        len(make_loader(dataset))


def test_length_covers_the_global_batch_and_divides():
    dataset = make_dataset([20, 40] * 10)
    for microbatches in islice(make_loader(dataset, multiple_of=12), 5):
        assert {batch["tokens"].shape[1] for batch in microbatches} == {48}


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_evaluation_sees_every_row_once_in_equal_shares(dp_size, microbatches):
    dataset = make_dataset([3 + number for number in range(13)])
    loaders = [
        EvalLoader(
            dataset, micro_batch_size=2, seq_length=128, pad_id=PAD, dp_rank=rank, dp_size=dp_size,
            microbatches=microbatches,
        )
        for rank in range(dp_size)
    ]  # fmt: skip
    steps = [list(loader) for loader in loaders]
    assert {len(lists) for lists in steps} == {len(loaders[0])} == {-(-13 // (2 * dp_size * microbatches))}
    seen, trained = [], 0
    for together in zip(*steps, strict=True):
        batches = [batch for pair in zip(*together, strict=True) for batch in pair]
        assert len(batches) == dp_size * microbatches
        assert len({batch["tokens"].shape for batch in batches}) == 1
        for batch in batches:
            real = batch["lengths"] > 0
            seen += batch["tokens"][real, 0].tolist()
            trained += batch["response_mask"].sum()
            assert (batch["tokens"][~real] == PAD).all()
            assert (batch["response_mask"][~real] == 0).all()
    assert seen == list(range(13))
    assert trained == dataset.stats.response_tokens


# Configuration and demo set


def test_configured_data_and_loaders():
    settings = config(eval_limit=10, pp=2)
    tokenizer = ByteTokenizer()
    train, held_out = build_sft_data(settings, tokenizer, 0, 2, 4)
    assert (len(train), len(held_out)) == (400, 10)
    steps = list(build_train_loader(settings, train, tokenizer, dp_rank=0, dp_size=2, multiple_of=4, start=2))
    assert [len(microbatches) for microbatches in steps] == [2, 2, 2]
    assert steps[0][0]["tokens"].shape[0] == 4
    evaluation = list(build_eval_loader(settings, held_out, tokenizer, dp_rank=1, dp_size=2, multiple_of=4))
    assert [len(microbatches) for microbatches in evaluation] == [2]
    assert [batch["tokens"].shape[0] for batch in evaluation[0]] == [8, 8]


def test_configured_packing_keeps_evaluation_unpacked():
    train, held_out = build_sft_data(config(pack=True), ByteTokenizer())
    assert train.packed
    assert not held_out.packed
    assert len(train) < 400 / 3
    batch = build_train_loader(config(pack=True), train, ByteTokenizer()).step(0)[0]
    assert int(batch["segment_ids"].max()) > 1


def test_no_evaluation_files_means_none():
    assert build_sft_data(config(eval=[]), ByteTokenizer())[1] is None


@pytest.mark.parametrize(
    ("changes", "multiple_of", "expected"),
    [
        ({"train": []}, 1, {"key": "data.train", "value": []}),
        (
            {"pack": True, "group_by_length": True},
            1,
            {"key": "data.pack", "value": True, "names": ("data.group_by_length=true",)},
        ),
        ({"seq_length": 126}, 4, {"key": "data.seq_length", "value": 126, "offers": {"data.seq_length": [124, 128]}}),
        ({"seq_length": 3}, 4, {"key": "data.seq_length", "value": 3, "offers": {"data.seq_length": [4]}}),
        (
            {"global_batch_size": 18},
            1,
            {"key": "trainer.global_batch_size", "value": 18, "offers": {"trainer.global_batch_size": [16, 20]}},
        ),
        ({"chat_template": "chatml"}, 1, {"names": ("data.chat_template='chatml'",)}),
    ],
)
def test_settings_that_cannot_work_are_named(changes, multiple_of, expected):
    with refused(ConfigError, **expected):
        build_sft_data(config(**changes), ByteTokenizer(), 0, 1, multiple_of)


def test_demo_files_are_what_the_script_makes():
    for name, text in make.files().items():
        assert (DEMO / name).read_text(encoding="utf-8") == text


def test_demo_set_fits_and_evaluates_on_prompts_of_its_own():
    train, held_out = build_sft_data(config(too_long="error"), ByteTokenizer())
    assert (len(train), len(held_out)) == (400, 60)
    prompts = [{bytes(d.tokens[d.response_mask == 0].astype(np.uint8)) for d in s.documents} for s in (train, held_out)]
    assert not prompts[0] & prompts[1]
