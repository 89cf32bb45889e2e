"""The tensors of a phase: a row per response on every rank, and the ways to send rows through an engine and back.

An engine is given passes, [slots, time] tokens in which several short responses may stand behind each other in a slot;
losses and everything else speak of rows. The last token of a row is chosen and never read: nothing follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megarl.config.schema import ModelConfig
from megarl.data.dataset import pack
from megarl.data.order import shard_rows
from megarl.models.flops import flops_per_token
from megarl.parallel.engine import Batch, Engine, ForwardFn, Stats
from megarl.parallel.grid import Grid
from megarl.parallel.products import few_sizes
from megarl.rollout.requests import Rollout

SHORT = 32  # rows up to this long share slots twice as long as the longest, so that less of a slot stays empty


def as_batch(rollouts: Sequence[Rollout]) -> Batch:
    """tokens, response_mask, rollout_logprobs [rows, time] and lengths [rows], right-padded, on the host."""
    lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts])
    shape = (len(rollouts), int(lengths.max()))
    batch = {
        "tokens": torch.zeros(shape, dtype=torch.long),
        "response_mask": torch.zeros(shape),
        "rollout_logprobs": torch.zeros(shape),
        "lengths": lengths,
    }
    for row, rollout in enumerate(rollouts):
        start, stop = len(rollout.prompt), len(rollout.tokens)
        batch["tokens"][row, :stop] = torch.tensor(rollout.tokens)
        batch["response_mask"][row, start:stop] = 1.0
        batch["rollout_logprobs"][row, start:stop] = torch.tensor(rollout.logprobs)
    return batch


class Passes:
    """Some rows of a batch, arranged for the passes of an engine over all data-parallel ranks.

    Every rank computes the whole arrangement, from lengths alone, and takes its own microbatches. All of them have the
    same [slots, time]; slots that were left over hold nothing.
    """

    def __init__(self, batch: Batch, rows: Tensor, grid: Grid, micro: int, *, share_slots: bool) -> None:
        """
        Args:
            rows: numbers of the rows, in any order.
            micro: rows of full length that a microbatch may hold.
            share_slots: put several short rows into one slot; they never attend to each other.
        """
        self.batch, self.rows, self.grid, self.packed = batch, rows, grid, share_slots
        layout, lengths = grid.layout, (batch["lengths"][rows] - 1).clamp(min=1)  # of what is read
        longest = int(lengths.max())
        room = 2 * longest if share_slots and longest <= SHORT else longest
        self.time = few_sizes(room, layout.tp if layout.sequence_parallel else 1)
        bins = (
            pack(lengths.numpy(), self.time, seed=0, shuffle=False)
            if share_slots
            else [np.array([row]) for row in range(len(rows))]
        )
        most = max(1, micro * longest // room)  # slots of a microbatch
        count = -(-len(bins) // (layout.dp * most))
        if layout.vpp > 1:  # an interleaved pipeline works in rounds of a microbatch per stage
            count = -(-count // layout.pp) * layout.pp
        self.slots = min(most, few_sizes(-(-len(bins) // (layout.dp * count)), steps=16))  # of each microbatch
        self._arrange(bins, layout.dp * count * self.slots, lengths.numpy())

    def _arrange(self, bins: Sequence[np.ndarray], slots: int, lengths: np.ndarray) -> None:
        """Where each row's first token stands, and what each slot holds."""
        width = self.batch["tokens"].shape[1]
        order = np.concatenate(list(bins))  # members, slot by slot
        held = np.array([len(members) for members in bins])
        first = np.repeat(np.cumsum(held) - held, held)  # place in `order` of the first member of the same slot
        ends = np.cumsum(lengths[order])
        begins = ends - lengths[order]
        slot, start = np.repeat(np.arange(len(bins)), held), begins - begins[first]
        row_slot, row_start = np.zeros((2, len(order)), dtype=np.int64)
        row_slot[order], row_start[order] = slot, start
        # Of every token that is read, in order: which member it is of, its number in that, and where it stands.
        member = np.repeat(np.arange(len(order)), lengths[order])
        number = np.arange(len(member)) - begins[member]
        stands = slot[member], start[member] + number
        source, segments = np.full((slots, self.time), -1), np.zeros((slots, self.time), dtype=np.int64)
        source[stands] = number + self.rows.numpy()[order][member] * width
        segments[stands] = member - first[member] + 1
        self.row_slot, self.row_start = torch.from_numpy(row_slot), torch.from_numpy(row_start)
        self.source = torch.from_numpy(source)  # number in [rows * time of the batch] of what stands there, or -1
        self.segments = torch.from_numpy(segments)

    def microbatches(self) -> list[Batch]:
        """This replica's. What a model reads is [slots, time]: tokens, positions, and segment_ids where slots are
        shared. What it is asked about is [slots, 1 + time], as `GPT.logprobs` has it: choices, the token that came
        after each that is read, and chosen, whether that is of a response. The batch's own tensors are cut down to the
        microbatch's rows, with `place` [rows, time], where `in_rows` finds the answers."""
        layout = self.grid.layout
        shares = shard_rows(np.arange(len(self.source)), self.grid.dp_rank, layout.dp, self.slots)
        return [self._microbatch(int(share[0]), int(share[-1]) + 1) for share in shares]

    def _microbatch(self, first: int, stop: int) -> Batch:
        source = self.source[first:stop]
        inside, source = source >= 0, source.clamp(min=0)
        tokens, mask = self.batch["tokens"].flatten(), self.batch["response_mask"].flatten()
        after = (source + 1).clamp(max=len(tokens) - 1)
        mine = (self.row_slot >= first) & (self.row_slot < stop)
        idle = not bool(mine.any())
        if idle:  # its slots hold nothing, but losses want a row: one that counts for nothing
            mine = torch.arange(len(self.rows)) == 0
        rows = self.rows[mine]
        microbatch = {key: value[rows] for key, value in self.batch.items() if key not in ("tokens",)}
        microbatch |= {
            "tokens": tokens[source] * inside,
            "positions": source % self.batch["tokens"].shape[1],
            "choices": pad(tokens[after] * inside, (1, 0)),
            "chosen": pad(mask[after] * inside, (1, 0)),
            "place": self._answers_at(self.row_slot[mine] - first, self.row_start[mine], self.batch["lengths"][rows]),
        }
        if idle:
            for key in ("response_mask", "place"):
                microbatch[key] = torch.zeros_like(microbatch[key])
        if self.packed:
            microbatch["segment_ids"] = self.segments[first:stop]
        return microbatch

    def collect(self, results: Sequence[Tensor]) -> Tensor:
        """This replica's [slots, 1 + time] answers, with those of the others, as [rows, time] on the host; 0 at first
        tokens and in padding, as the first of all answers is."""
        local = torch.stack(list(results)).contiguous()  # [microbatches, slots, 1 + time]
        parts = [local]
        if self.grid.layout.dp > 1:
            parts = [torch.empty_like(local) for _ in range(self.grid.layout.dp)]
            dist.all_gather(parts, local, group=self.grid.groups.dp)
        # Slots were dealt out in rounds, `slots` of them to each replica.
        flat = torch.stack(parts, dim=1).flatten().cpu()
        return flat[self._answers_at(self.row_slot, self.row_start, self.batch["lengths"][self.rows])]

    def _answers_at(self, slot: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
        """[rows, time] where the answer about each token stands among all of [slots, 1 + time]. First tokens, which
        nothing chose, and padding are sent to the first of all, where the answer is 0."""
        time = torch.arange(self.batch["tokens"].shape[1])
        stands = slot[:, None] * (1 + self.time) + start[:, None] + time
        return torch.where((time > 0) & (time < lengths[:, None]), stands, 0)


def in_rows(answers: Tensor, batch: Batch) -> Tensor:
    """A model's [slots, 1 + time] answers about a microbatch as [rows, time], 0 at first tokens and in padding."""
    return answers.flatten()[batch["place"]]


def evaluate(engine: Engine, batch: Batch, fn: ForwardFn, micro: int, *, share_slots: bool) -> Batch:
    """`fn`'s tensors, [slots, 1 + time], for every row as [rows, time] on every rank: each replica runs its share."""
    rows = torch.arange(len(batch["tokens"]))
    passes = Passes(batch, rows, engine.grid, micro, share_slots=share_slots)
    results = engine.forward(passes.microbatches(), fn)
    return {key: passes.collect([result[key] for result in results]) for key in results[0]}


def count_chosen(batch: Batch) -> Stats:
    """The tokens of a microbatch that are trained on."""
    return {"tokens": batch["chosen"].sum()}


def training_flops(model: ModelConfig, vocab_size: int, lengths: Tensor) -> float:
    """Operations of forward and backward over rows of these lengths, whose last tokens are not read."""
    read = (lengths.double() - 1).clamp(min=1)
    return float(read.sum()) * flops_per_token(model, vocab_size, float((read**2).sum() / read.sum()))
