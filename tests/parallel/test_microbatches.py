"""Rows in microbatches: every token where it belongs, each row once over all replicas, units whole, the same rows
back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import MicrobatchPlan
from megarl.parallel.packing import round_up_to_bucket
from megarl.parallel.rows import Microbatch, Rows
from tests.worlds import Worlds

LAYOUTS = [Layout(), Layout(dp=2), Layout(dp=4), Layout(pp=2, vpp=2), Layout(tp=4, dp=2, sequence_parallel=True)]


def rows_of(*lengths: tuple[int, int]) -> Rows:
    """Rows of (prompt, response) tokens; every token of a row is different, and none is 0."""
    width = max(map(sum, lengths))
    tokens, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width)
    for row, (prompt, response) in enumerate(lengths):
        tokens[row, : prompt + response] = (7 * row + torch.arange(prompt + response)) % 100 + 1
        mask[row, prompt : prompt + response] = 1
    sizes = torch.tensor([sum(length) for length in lengths])
    return Rows(tokens, sizes, mask).with_columns(number=torch.arange(len(lengths)), doubled=tokens * 2)


UNEQUAL = rows_of((1, 9), (2, 1), (1, 4), (3, 3), (1, 1), (5, 5), (1, 2))
ROWS = [[0, 1, 2, 3, 4, 5, 6], [6, 0, 3], [4]]


def replicas(layout: Layout, rows: Rows, numbers: list[int] | None = None, **options: Any) -> list[list[Microbatch]]:
    """Every replica's microbatches."""
    chosen = torch.arange(len(rows)) if numbers is None else torch.tensor(numbers)
    options = {"per_microbatch": 100, "share_bins": True, **options}
    plans = [MicrobatchPlan(rows.lengths[chosen], layout, rank, **options) for rank in range(layout.dp)]
    return [plan.microbatches(rows, chosen) for plan in plans]


def check_microbatch(batch: Microbatch, rows: Rows, *, read_last: bool = False) -> list[int]:
    """Check each row of a microbatch against the row it was made of; return their numbers."""
    found = []
    before = batch.gather_rows(batch.tokens)
    positions, targets, mask = map(batch.gather_rows, (batch.positions, batch.targets, batch.target_mask))
    after = batch.gather_states(batch.tokens)
    for row, length in enumerate(batch.rows.lengths.tolist()):
        if not length:  # a filler
            assert not batch.rows.action_mask[row].any()
            assert (batch.token_index[row] == -1).all()
            assert (batch.last_index == -1).all()
            assert not after[row].any()
            continue
        number = int(batch.rows["number"][row])
        tokens = rows.tokens[number]
        assert torch.equal(batch.rows["doubled"][row], rows["doubled"][number])
        assert before[row, 1:length].tolist() == tokens[: length - 1].tolist()
        assert targets[row, 1:length].tolist() == tokens[1:length].tolist()
        assert positions[row, 1:length].tolist() == list(range(length - 1))
        assert torch.equal(mask[row], rows.action_mask[number])
        assert not targets[row, 0]
        assert not targets[row, length:].any()
        index = batch.token_index[row, 1:length]
        assert len(set(index.tolist())) == length - 1
        read = length if read_last or length == 1 else length - 1
        assert after[row].tolist() == [*tokens[:read].tolist(), *[0] * (after.shape[1] - read)]
        found.append(number)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("per_microbatch", [1, 2, 100])
@pytest.mark.parametrize("share_bins", [False, True])
@pytest.mark.parametrize("read_last", [False, True])
@pytest.mark.parametrize("numbers", ROWS, ids=str)
def test_each_row_is_read_once_and_whole(
    layout: Layout, per_microbatch: int, share_bins: bool, read_last: bool, numbers: list[int]
) -> None:
    options = {"per_microbatch": per_microbatch, "share_bins": share_bins, "read_last": read_last}
    microbatches = replicas(layout, UNEQUAL, numbers, **options)
    found, read, shapes = [], 0, set()
    for mine in microbatches:
        assert len(mine) % (layout.pp if layout.vpp > 1 else 1) == 0
        for batch in mine:
            shapes.add((len(mine), *batch.tokens.shape))
            found += check_microbatch(batch, UNEQUAL, read_last=read_last)
            read += int(batch.tokens.count_nonzero())
            assert float(batch.target_mask.sum()) == float(batch.rows.action_mask.sum())
    assert sorted(found) == sorted(numbers)
    assert read == int(UNEQUAL.lengths[numbers].sum()) - (0 if read_last else len(numbers))
    assert len(shapes) == 1, "all microbatches of all replicas have one shape"
    (shape,) = shapes
    assert shape[2] % (layout.tp if layout.sequence_parallel else 1) == 0


def test_units_are_never_parted_and_everything_is_read_once() -> None:
    """Random units of one to four rows, in any layout: the rows of a unit stand in one bin, one after the other."""
    dice = random.Random(0)
    for _ in range(100):
        lengths = [(dice.randint(1, 5), dice.randint(1, 9)) for _ in range(dice.randint(1, 30))]
        rows = rows_of(*lengths)
        unit = torch.tensor(sorted(dice.randint(0, len(lengths) // 2) for _ in lengths))
        if dice.random() < 0.5:  # rows of a unit need not be neighbours
            unit = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(dice.randint(0, 99)))]
        layout = dice.choice(LAYOUTS)
        options = {"share_bins": dice.random() < 0.5, "per_microbatch": dice.choice([1, 2, 100])}
        read_last = dice.random() < 0.5
        found = []
        for mine in replicas(layout, rows, keep_together=unit, read_last=read_last, **options):
            for batch in mine:
                numbers = check_microbatch(batch, rows, read_last=read_last)
                found += numbers
                for number in numbers:
                    members = torch.nonzero(unit == unit[number]).flatten().tolist()
                    assert set(members) <= set(numbers)
                    assert one_after_the_other(batch, rows, numbers, members, read_last=read_last)
                if not numbers:  # the filler is a whole unit too
                    first = torch.nonzero(unit == unit[0]).flatten()
                    assert torch.equal(batch.rows["number"], first)
        assert sorted(found) == list(range(len(lengths)))


def one_after_the_other(
    batch: Microbatch, rows: Rows, numbers: list[int], members: list[int], *, read_last: bool
) -> bool:
    """Whether rows are read one directly after the other in one bin, each as a segment of its own."""
    assert batch.segment_ids is not None
    segments = batch.segment_ids.flatten()
    starts = {int(batch.token_index[numbers.index(one), 1]): one for one in members}
    assert -1 not in starts
    at = min(starts)
    seen = []
    for start in sorted(starts):
        length = int(rows.lengths[starts[start]]) - (0 if read_last else 1)
        if start != at or len(set(segments[start : start + length].tolist())) != 1:
            return False
        seen.append(int(segments[start]))
        at += length
    one_bin = min(starts) // batch.tokens.shape[1] == (at - 1) // batch.tokens.shape[1]
    return one_bin and len(set(seen)) == len(members) and 0 not in seen


def test_a_row_of_no_tokens_has_no_last_one() -> None:
    rows = Rows(torch.tensor([[1, 2, 3], [0, 0, 0], [4, 5, 6]]), torch.tensor([3, 0, 3]), torch.zeros(3, 3))
    ((batch,),) = replicas(Layout(), rows, read_last=True)
    assert batch.gather_states(batch.tokens).tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 6]]


def test_bins_are_no_longer_than_the_data_allows() -> None:
    for sequence_parallel, wanted in ((False, 1025), (True, 1026)):
        layout = Layout(tp=2, sequence_parallel=sequence_parallel)
        plan = MicrobatchPlan([1026], layout, 0, per_microbatch=1, share_bins=False, longest=1025)
        assert plan.time == wanted
    assert MicrobatchPlan([1026], Layout(), 0, per_microbatch=1, share_bins=False).time == 1152


def test_everything_moves_to_a_device() -> None:
    ((batch,),) = replicas(Layout(), UNEQUAL)
    moved = batch.to(torch.device("meta")).tensors()
    assert {name: (tensor.shape, tensor.device.type) for name, tensor in moved.items()} == {
        name: (tensor.shape, "meta") for name, tensor in batch.tensors().items()
    }


def test_rows_that_share_a_bin_have_segments_and_positions_of_their_own() -> None:
    """Rows of which 9 and 2, 4 and 5, 1 ... tokens are read: a bin of 18 holds several, each from position 0."""
    ((batch,),) = replicas(Layout(), UNEQUAL)
    assert len(batch.tokens) < len(UNEQUAL)
    assert batch.segment_ids is not None
    for segments, positions, mask in zip(batch.segment_ids, batch.positions, batch.target_mask, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            (where,) = torch.nonzero(segments == segment, as_tuple=True)
            assert torch.equal(where, torch.arange(int(where[0]), int(where[0]) + len(where)))
            assert positions[where].tolist() == list(range(len(where)))
        assert not mask[segments == 0].any()
    assert replicas(Layout(), UNEQUAL, share_bins=False)[0][0].segment_ids is None


def test_rows_that_hold_documents_keep_their_segments_and_positions() -> None:
    mask = torch.tensor([[0.0, 1, 1, 0, 1], [0, 1, 0, 1, 0]])
    rows = Rows(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]), torch.tensor([5, 4]), mask).with_columns(
        positions=torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 0]]),
        segment_ids=torch.tensor([[1, 1, 1, 2, 2], [1, 1, 2, 2, 0]]),
    )
    ((batch,),) = replicas(Layout(), rows, share_bins=False)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 2, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 5], [7, 8, 9, 0]]
    assert batch.target_mask.tolist() == [[1, 1, 0, 1], [1, 0, 1, 0]]


@pytest.mark.parametrize("lengths", [[(1, 0)] * 3, [(1, 0), (1, 4), (1, 0)]], ids=str)
def test_a_row_of_one_token_is_read_and_has_no_target(lengths: list[tuple[int, int]]) -> None:
    rows = rows_of(*lengths)
    ((batch,),) = replicas(Layout(), rows)
    assert check_microbatch(batch, rows) == [0, 1, 2]
    assert float(batch.target_mask.sum()) == float(rows.action_mask.sum())


def test_plans_meet_few_shapes() -> None:
    """Of minibatches that differ by a row, and never more bins than a microbatch may hold."""
    seen = set()
    for rows in range(64, 129):
        plan = MicrobatchPlan(torch.full((rows,), 40), Layout(), 0, per_microbatch=128, share_bins=True)
        assert rows <= plan.bins <= 128
        seen.add((plan.bins, plan.time))
    assert len(seen) <= 17
    assert MicrobatchPlan(torch.full((37,), 40), Layout(), 0, per_microbatch=37, share_bins=True).bins == 37


def test_a_microbatch_holds_no_more_than_its_rows_of_full_length() -> None:
    for share_bins in (False, True):
        for batch in replicas(Layout(), UNEQUAL, per_microbatch=2, share_bins=share_bins)[0]:
            assert batch.tokens.numel() <= round_up_to_bucket(2 * 10) + 2


def test_tensors_have_names_that_say_whose_they_are() -> None:
    ((batch,),) = replicas(Layout(), UNEQUAL)
    assert {"tokens", "targets", "segment_ids", "rows.tokens", "rows.action_mask", "rows.doubled"} <= set(
        batch.tensors()
    )
    assert "segment_ids" not in replicas(Layout(), UNEQUAL, share_bins=False)[0][0].tensors()


def test_a_column_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="advantages"):
        UNEQUAL.with_columns(advantages=torch.zeros(7, 3))
    with pytest.raises(ValueError, match="tokens"):
        UNEQUAL.with_columns(tokens=UNEQUAL.tokens)


def echoed(pp: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Targets in rows, and the tokens that were read, over the current world: stages, and the rest data parallel."""
    grid = Grid(Layout.for_world(dist.get_world_size(), pp=pp), start_world())
    found = []
    try:
        for per_microbatch, share_bins in ((1, False), (3, False), (2, True)):
            options: dict[str, Any] = {"per_microbatch": per_microbatch, "share_bins": share_bins, "read_last": True}
            plan = MicrobatchPlan(UNEQUAL.lengths, grid.layout, grid.dp_rank, **options)
            microbatches = plan.microbatches(UNEQUAL)
            targets = plan.collect([batch.targets for batch in microbatches], grid, width)
            found.append((targets, plan.collect_states([batch.tokens for batch in microbatches], grid, width)))
    finally:
        grid.close()
    return found


def test_every_rank_gets_all_rows_back_in_their_order(worlds: Worlds) -> None:
    wanted = pad(UNEQUAL.tokens[:, 1:], (1, 0))
    width = UNEQUAL.tokens.shape[1]
    for world, pp in ((1, 1), (2, 1), (2, 2), (4, 2)):
        for found in worlds.run(world, echoed, pp, width):
            assert len(found) == 3
            for targets, tokens in found:
                assert torch.equal(targets, wanted)
                assert torch.equal(tokens, UNEQUAL.tokens)


def test_outputs_that_are_not_finite_stay_where_they_are() -> None:
    """Padding and first tokens have no output, whatever stands at the position they would be read from."""
    ((batch,),) = replicas(Layout(), UNEQUAL)
    gathered = batch.gather_rows(torch.full(batch.tokens.shape, np.nan))
    assert torch.equal(gathered.isnan(), batch.token_index >= 0)
    assert gathered[~gathered.isnan()].tolist() == [0] * int((batch.token_index < 0).sum())
    ((batch,),) = replicas(Layout(), UNEQUAL, read_last=True)
    is_token = torch.arange(10) < UNEQUAL.lengths[:, None]
    assert torch.equal(batch.gather_states(torch.full(batch.tokens.shape, np.nan)).isnan(), is_token)


def shape_of(lengths: list[int], layout: Layout | None = None, **options: Any) -> tuple[int, int, int]:
    """Number of microbatches, bins of each and tokens of a bin, of rows whose last token is read."""
    options = {"per_microbatch": 8, "share_bins": True, "read_last": True, **options}
    plan = MicrobatchPlan(lengths, layout or Layout(), 0, **options)
    return plan.count, plan.bins, plan.time


def test_bins_are_longer_than_the_longest_row_where_less_of_them_stays_empty() -> None:
    # Of 64 tokens, five bins are needed, as two rows of 32 share one. Of 96, three are full: 64 + 32 each.
    assert shape_of([64, 64, 64, 32, 32, 32], per_microbatch=6) == (1, 3, 96)
    assert shape_of([64, 64, 64, 64]) == (1, 4, 64)
    assert shape_of([64, 64, 64, 32, 32, 32], share_bins=False) == (1, 6, 64)


def test_bins_are_at_most_twice_as_long_as_the_longest_row() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(2, 200, size=40).tolist()
        count, bins, time = shape_of(lengths)
        assert max(lengths) <= time <= round_up_to_bucket(2 * max(lengths))
        assert bins * time <= 8 * round_up_to_bucket(max(lengths)) * 1.25, "a microbatch is not larger than planned"
        assert count * bins * time >= sum(lengths)


def test_a_microbatch_of_a_single_row_has_no_longer_bins() -> None:
    assert shape_of([100, 60, 60, 60], per_microbatch=1)[1:] == (1, round_up_to_bucket(100))


def test_long_rows_keep_their_length_as_attention_would_cost_more() -> None:
    rows = [8192, 8192, 8192, 4096, 4096, 4096]
    assert shape_of(rows, per_microbatch=6)[2] == 8192
    assert shape_of([length // 128 for length in rows], per_microbatch=6)[2] == 96


def test_of_lengths_that_round_to_one_the_most_bins_are_kept() -> None:
    layout = Layout(tp=8, sequence_parallel=True)
    assert shape_of([9, 7] * 64, layout, per_microbatch=32) == (2, 32, 16)


@pytest.mark.parametrize("per_microbatch", [1, 3, 100])
@pytest.mark.parametrize("share_bins", [False, True])
def test_an_encoder_reads_each_prompt_and_a_decoder_each_response_within_the_memory_of_single_bins(
    share_bins: bool, per_microbatch: int
) -> None:
    dice = random.Random(0)
    rows = rows_of(*((dice.randint(8, 16), dice.randint(2, 9)) for _ in range(24)))
    options = {"share_bins": share_bins, "per_microbatch": per_microbatch}
    plan = MicrobatchPlan(rows.lengths, Layout(), 0, prompts=rows.prompts, **options)
    found, positions = [], 0
    for batch in plan.microbatches(rows):
        assert batch.encoder is not None
        assert batch.encoder.segment_ids is not None
        positions += batch.tokens.shape[0] * batch.time
        before = batch.gather_rows(batch.tokens)
        for row, number in enumerate(batch.rows["number"].tolist()):
            prompt, length = int(rows.prompts[number]), int(rows.lengths[number])
            home, segment = int(plan.row_bin[number]) % plan.bins, int(plan.row_segment[number])
            read = batch.encoder.tokens[home][batch.encoder.segment_ids[home] == segment]
            assert read.tolist() == rows.tokens[number, :prompt].tolist()
            assert before[row, prompt:length].tolist() == rows.tokens[number, prompt - 1 : length - 1].tolist()
            found.append(number)
    assert sorted(found) == list(range(24))
    assert plan.bins * (plan.time + plan.encoder_time) <= per_microbatch * (16 + 9) * 1.25  # rounded to buckets
    if share_bins and per_microbatch == 100:
        assert positions < 0.85 * 24 * (16 + 9)  # of bins for single rows
