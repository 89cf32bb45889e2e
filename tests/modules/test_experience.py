"""Rows of a phase in passes: every token where it belongs, each row once over all replicas, the same answers back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megarl.config.schema import ModelConfig
from megarl.models.flops import flops_per_token
from megarl.models.gpt import GPT
from megarl.modules.experience import Passes, as_batch, evaluate, in_rows, training_flops
from megarl.parallel.engine import Batch
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.products import few_sizes
from megarl.rollout.requests import Rollout
from tests.parallel.engines import VOCAB, small_engine
from tests.worlds import Worlds

EOS = 9


def rollouts(*lengths: tuple[int, int]) -> list[Rollout]:
    """Of (prompt, response) tokens; every token of a row is different, and none is 0."""
    made = []
    for row, (prompt, response) in enumerate(lengths):
        tokens = [(7 * row + place) % (VOCAB - 1) + 1 for place in range(prompt + response)]
        logprobs = [-float(place) - row for place in range(response)]
        made.append(Rollout(row, 0, tokens[:prompt], tokens[prompt:], logprobs, "length"))
    return made


UNEQUAL = as_batch(rollouts((1, 9), (2, 1), (1, 4), (3, 3), (1, 1), (5, 5), (1, 2)))


def test_a_batch_by_hand() -> None:
    """The end of sequence is an action like any other, also where it is the padding's id."""
    batch = as_batch(
        [Rollout(0, 0, [5], [6, 0], [-0.5, -0.25], "eos"), Rollout(1, 0, [7, 8], [1], [-1.0], "length")],
    )
    assert batch["tokens"].tolist() == [[5, 6, 0], [7, 8, 1]]
    assert batch["response_mask"].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert batch["rollout_logprobs"].tolist() == [[0, -0.5, -0.25], [0, 0, -1.0]]
    assert batch["lengths"].tolist() == [3, 3]


def replicas(layout: Layout, micro: int, share_slots: bool, rows: list[int]) -> list[list[Batch]]:
    """Every replica's microbatches."""
    grids: list[Any] = [SimpleNamespace(layout=layout, dp_rank=rank) for rank in range(layout.dp)]
    numbers = torch.tensor(rows)
    return [Passes(UNEQUAL, numbers, grid, micro, share_slots=share_slots).microbatches() for grid in grids]


LAYOUTS = [Layout(), Layout(dp=2), Layout(dp=4), Layout(pp=2, vpp=2), Layout(tp=4, dp=2, sequence_parallel=True)]
ROWS = [[0, 1, 2, 3, 4, 5, 6], [6, 0, 3], [4]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("micro", [1, 2, 100])
@pytest.mark.parametrize("share_slots", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_each_row_is_in_one_replicas_passes_once_and_whole(
    layout: Layout, micro: int, share_slots: bool, rows: list[int]
) -> None:
    found: list[tuple[list[int], list[float]]] = []
    shapes = set()
    for microbatches in replicas(layout, micro, share_slots, rows):
        assert len(microbatches) % (layout.pp if layout.vpp > 1 else 1) == 0
        for batch in microbatches:
            shapes.add((len(microbatches), *batch["tokens"].shape))
            before = {key: in_rows(pad(batch[key], (1, 0)), batch) for key in ("tokens", "positions")}
            choices, chosen = in_rows(batch["choices"], batch), in_rows(batch["chosen"], batch)
            trained = batch["response_mask"].any(dim=1)
            assert float(batch["chosen"].sum()) == float(batch["response_mask"].sum())
            for row in range(len(choices)):
                length = int(batch["lengths"][row])
                if not trained[row]:
                    continue
                assert before["positions"][row].tolist() == [0, *range(length - 1), *[0] * (10 - length)]
                assert torch.equal(chosen[row], batch["response_mask"][row])
                assert len(set(batch["place"][row, 1:length].tolist()) - {0}) == length - 1
                first = int(before["tokens"][row, 1])
                assert before["tokens"][row, 1:length].tolist() == [first, *choices[row, 1 : length - 1].tolist()]
                found.append(([first, *choices[row, 1:length].tolist()], batch["rollout_logprobs"][row].tolist()))
    wanted = [
        (UNEQUAL["tokens"][row, : int(UNEQUAL["lengths"][row])].tolist(), UNEQUAL["rollout_logprobs"][row].tolist())
        for row in rows
    ]
    assert sorted(found) == sorted(wanted)
    read = sum(
        int(batch["tokens"].count_nonzero())
        for batches in replicas(layout, micro, share_slots, rows)
        for batch in batches
    )
    assert read == int(UNEQUAL["lengths"][rows].sum()) - len(rows), "all tokens of a row but its last"
    assert len(shapes) == 1, "all microbatches of all replicas have one shape"
    (shape,) = shapes
    assert shape[2] % (layout.tp if layout.sequence_parallel else 1) == 0


@pytest.mark.parametrize("rows", [[(1, 0)] * 3, [(1, 0), (1, 4), (1, 0)]], ids=str)
def test_a_row_of_one_token_is_read_and_chooses_nothing(rows: list[tuple[int, int]]) -> None:
    batch = as_batch(rollouts(*rows))
    grid: Any = SimpleNamespace(layout=Layout(), dp_rank=0)
    (microbatch,) = Passes(batch, torch.arange(3), grid, 100, share_slots=True).microbatches()
    assert float(microbatch["chosen"].sum()) == float(batch["response_mask"].sum())
    assert in_rows(microbatch["choices"], microbatch).tolist() == (batch["tokens"] * batch["response_mask"]).tolist()


def test_operations_of_rows_leave_out_what_is_not_read() -> None:
    model = ModelConfig(num_layers=2, hidden_size=16, num_heads=2)
    three_and_one = training_flops(model, 10, torch.tensor([4, 2]))
    assert three_and_one == pytest.approx(4 * flops_per_token(model, 10, 2.5))


def test_rows_that_share_a_slot_have_segments_and_positions_of_their_own() -> None:
    """Rows of which 9 and 2, 4 and 5, 1 ... tokens are read: a slot of 18 holds several, each from position 0."""
    ((batch,),) = replicas(Layout(), 100, True, ROWS[0])
    assert len(batch["tokens"]) < len(ROWS[0])
    for slot in range(len(batch["tokens"])):
        segments, positions = batch["segment_ids"][slot], batch["positions"][slot]
        for segment in range(1, int(segments.max()) + 1):
            (where,) = torch.nonzero(segments == segment, as_tuple=True)
            assert torch.equal(where, torch.arange(int(where[0]), int(where[0]) + len(where)))
            assert positions[where].tolist() == list(range(len(where)))
        assert not batch["chosen"][slot, 1:][segments == 0].any()
    assert "segment_ids" not in replicas(Layout(), 100, False, ROWS[0])[0][0]


def test_passes_meet_few_shapes() -> None:
    """Of minibatches that differ by a row, and never more slots than a microbatch may hold."""
    grid: Any = SimpleNamespace(layout=Layout())
    seen = set()
    for rows in range(64, 129):
        batch = {"tokens": torch.zeros(rows, 40, dtype=torch.long), "lengths": torch.full((rows,), 40)}
        passes = Passes(batch, torch.arange(rows), grid, 128, share_slots=True)
        assert rows <= passes.slots <= 128
        seen.add((passes.slots, passes.time))
    assert len(seen) <= 17
    narrow = Passes(batch, torch.arange(37), grid, 37, share_slots=True)
    assert narrow.slots == 37


def test_a_microbatch_holds_no_more_than_its_rows_of_full_length() -> None:
    for share_slots in (False, True):
        for batch in replicas(Layout(), 2, share_slots, ROWS[0])[0]:
            assert batch["tokens"].numel() <= few_sizes(2 * 10) + 2


class Echo:
    """An engine whose answers to a pass are what was chosen in each state, and the state's position."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid

    def forward(self, microbatches: list[Batch], fn: Any) -> list[Batch]:
        return [fn(None, batch["choices"].float(), batch) for batch in microbatches]


def echoed(micro: int, share_slots: bool) -> Batch:
    """Over the current world, all of it data parallel."""
    grid = Grid(Layout.for_world(dist.get_world_size()), start_world())
    engine: Any = Echo(grid)
    try:
        return evaluate(
            engine,
            UNEQUAL,
            lambda model, hidden, batch: {"tokens": hidden, "positions": pad(batch["positions"], (1, 0))},
            micro,
            share_slots=share_slots,
        )
    finally:
        grid.close()


def test_every_rank_gets_all_rows_back_in_their_order(worlds: Worlds) -> None:
    time = torch.arange(10)
    within = (time > 0) & (time < UNEQUAL["lengths"][:, None])
    for world in (1, 2):
        for micro, share_slots in ((1, False), (3, False), (2, True)):
            for found in worlds.run(world, echoed, micro, share_slots):
                assert torch.equal(found["tokens"], (UNEQUAL["tokens"] * within).float())
                assert torch.equal(found["positions"], (time - 1) * within)
                assert found["positions"].dtype == torch.long


def judged(share_slots: bool, model: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs, values, and gradients of their sum, of a small model with a value head."""
    engine = small_engine({}, model, value_head=True)

    def of_whole_rows(model: GPT, hidden: Tensor, batch: Batch) -> Batch:
        logprobs = model.logprobs(hidden, batch["tokens"], batch["response_mask"]).logprobs
        return {"logprobs": logprobs, "values": model.values(hidden)[:, :-1] * batch["response_mask"]}

    def both(model: GPT, hidden: Tensor, batch: Batch) -> Batch:
        return {
            "logprobs": model.logprobs(hidden, batch["choices"], batch["chosen"]).logprobs,
            "values": model.values(hidden),
        }

    def loss(model: GPT, hidden: Tensor, batch: Batch, counts: dict[str, float]) -> tuple[Tensor, Batch]:
        out, mask = both(model, hidden, batch), batch["response_mask"]
        rows = in_rows(out["logprobs"], batch) * batch["rollout_logprobs"] + in_rows(out["values"], batch)
        total = (rows * mask).sum() / counts["tokens"]
        return total, {"loss": total}

    found = evaluate(engine, UNEQUAL, both, 2, share_slots=share_slots)
    rows = torch.arange(len(UNEQUAL["tokens"]))
    positions = torch.arange(UNEQUAL["tokens"].shape[1]).expand_as(UNEQUAL["tokens"])
    (whole,) = engine.forward([{**UNEQUAL, "positions": positions}], of_whole_rows)
    for key, answers in whole.items():
        torch.testing.assert_close(found[key] * UNEQUAL["response_mask"], answers, rtol=1e-5, atol=1e-5)
    passes = Passes(UNEQUAL, rows, engine.grid, 2, share_slots=share_slots).microbatches()
    engine.train_step(passes, loss, lambda batch: {"tokens": batch["response_mask"].sum()})
    gradients = {name: parameter.main_grad.clone() for name, parameter in engine.parameters()}
    engine.grid.close()
    mask = UNEQUAL["response_mask"]
    return found["logprobs"] * mask, found["values"] * mask, gradients


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_rows_that_share_slots_are_judged_and_trained_as_if_they_did_not(position: str, worlds: Worlds) -> None:
    model = {"position": position, "max_positions": 12}
    ((logprobs, values, gradients),) = worlds.run(1, judged, False, model)
    ((shared_logprobs, shared_values, shared_gradients),) = worlds.run(1, judged, True, model)
    assert logprobs.abs().sum() > 0
    torch.testing.assert_close(shared_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_values, values, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            shared_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
