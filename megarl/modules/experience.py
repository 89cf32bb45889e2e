"""The tensors of a phase: all rows on every rank, and the ways to send them through an engine and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.data.order import shard_rows
from megarl.parallel.engine import Batch, Engine, ForwardFn
from megarl.parallel.grid import Grid
from megarl.rollout.requests import Rollout

GROUPS = 4  # of rows of similar length that an evaluation is cut into: each is as long as its longest row


def as_batch(rollouts: Sequence[Rollout], pad_id: int, multiple_of: int) -> Batch:
    """tokens, positions, response_mask, rollout_logprobs [rows, time] and lengths [rows], right-padded, on the host."""
    time, rows = bucket(max(len(rollout.tokens) for rollout in rollouts), multiple_of), len(rollouts)
    lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts])
    batch = {
        "tokens": torch.full((rows, time), pad_id),
        # Padding may reach past the model's last position, so it repeats its row's.
        "positions": torch.minimum(torch.arange(time), lengths[:, None] - 1),
        "response_mask": torch.zeros(rows, time),
        "rollout_logprobs": torch.zeros(rows, time),
        "lengths": lengths,
    }
    for row, rollout in enumerate(rollouts):
        start, stop = len(rollout.prompt), len(rollout.tokens)
        batch["tokens"][row, :stop] = torch.tensor(rollout.tokens)
        batch["response_mask"][row, start:stop] = 1.0
        batch["rollout_logprobs"][row, start:stop] = torch.tensor(rollout.logprobs)
    return batch


def bucket(longest: int, multiple_of: int) -> int:
    """A batch length that wastes at most an eighth, so that phases meet few shapes; a multiple of `multiple_of`."""
    step = max(1, 1 << max(0, longest.bit_length() - 4)) * multiple_of
    return (longest + step - 1) // step * step


def take(batch: Batch, rows: Tensor, time: int) -> Batch:
    """Some rows, cut at `time`; a number past the last one is a row that counts for nothing: masked, of length 0."""
    count = batch["tokens"].shape[0]
    inside, rows = rows < count, rows.clamp(max=count - 1)
    taken = {key: value[rows, :time] if value.dim() > 1 else value[rows] for key, value in batch.items()}
    taken["response_mask"] = taken["response_mask"] * inside[:, None]
    taken["lengths"] = taken["lengths"] * inside
    return taken


def microbatches(batch: Batch, rows: Tensor, grid: Grid, micro: int) -> list[Batch]:
    """This replica's share of a minibatch, in as few microbatches of at most `micro` rows as there can be.

    All are equally large and as long as the minibatch's longest row needs; rows that count for nothing fill up the
    last ones.
    """
    layout = grid.layout
    count = -(-len(rows) // (micro * layout.dp))
    if layout.vpp > 1:  # an interleaved pipeline works in rounds of a microbatch per stage
        count = -(-count // layout.pp) * layout.pp
    size = -(-len(rows) // (layout.dp * count))
    longest = int(batch["lengths"][rows].max())
    time = min(bucket(longest, sequence_parts(grid)), batch["tokens"].shape[1])
    fill = rows.new_full((layout.dp * count * size - len(rows),), batch["tokens"].shape[0])
    shares = shard_rows(torch.cat([rows, fill]).numpy(), grid.dp_rank, layout.dp, size)
    return [take(batch, torch.as_tensor(share), time) for share in shares]


def sequence_parts(grid: Grid) -> int:
    """What divides the length of every batch."""
    return grid.layout.tp if grid.layout.sequence_parallel else 1


def evaluate(engine: Engine, batch: Batch, fn: ForwardFn, micro: int) -> Batch:
    """`fn`'s tensors [rows, time] for every row, on every rank: each replica runs its share, then all are gathered."""
    grid, (rows, time) = engine.grid, batch["tokens"].shape
    found: dict[str, Tensor] = {}
    # Rows of similar length go together, so that short ones are not padded to the longest of the phase.
    order = torch.argsort(batch["lengths"], stable=True)
    for group in order.tensor_split(min(GROUPS, max(1, rows // (micro * grid.layout.dp)))):
        results = engine.forward(microbatches(batch, group, grid, micro), fn)
        for key in results[0]:
            values = _gather([result[key] for result in results], grid)[: len(group)].cpu()
            whole = found.setdefault(key, torch.zeros(rows, time, dtype=values.dtype))
            whole[group, : values.shape[1]] = values
    return found


def _gather(results: list[Tensor], grid: Grid) -> Tensor:
    """[rows, time] of all replicas, in the order that `shard_rows` shared them out: in rounds, one slice to each."""
    local = torch.stack(results).contiguous()  # [microbatches, micro, time]
    if grid.layout.dp == 1:
        return local.flatten(0, 1)
    parts = [torch.empty_like(local) for _ in range(grid.layout.dp)]
    dist.all_gather(parts, local, group=grid.groups.dp)
    return torch.stack(parts, dim=1).flatten(0, 2)
