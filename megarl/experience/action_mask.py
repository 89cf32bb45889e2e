"""The action mask of NLPO (arXiv 2210.01241): the policy chooses among likely tokens of an earlier copy of itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config.ppo_sections import ActionMaskConfig
from megarl.experience.rows import forward_rows
from megarl.models.gpt import GPT
from megarl.parallel.choices import Choices, TokenLists
from megarl.parallel.engine import Engine, Outputs
from megarl.parallel.rows import Microbatch, Rows
from megarl.parallel.vocab import CHUNK_ELEMENTS_CPU
from megarl.rollout.lane import Masking
from megarl.rollout.sampling import nucleus

Chunk = tuple[Tensor, Tensor, Tensor]
"""Indices [n] of lists of tokens, their lengths [n], and the tokens of all of them."""


class ActionMask:
    """The copy of the policy, and the tokens that it allows in the responses of the present phase.

    The tokens of a phase are computed once, so that all passes of the phase normalise over the same ones. They are
    those of generation, except that rounding may exclude a token at the edge of the nucleus; the token that was sampled
    is always among them.
    """

    def __init__(self, copy: Engine, settings: ActionMaskConfig, temperature: float) -> None:
        """`temperature` is that of training's samples."""
        self.settings, self.temperature = settings, temperature
        self.masking = Masking(copy, settings.top_p)
        self.lists: TokenLists | None = None  # on the last pipeline stage, the allowed tokens at each action

    def refresh(self, policy: Engine) -> None:
        """Copy the policy's present weights."""
        self.masking.engine.start_from(policy)

    def is_due(self, phases: int) -> bool:
        """Return whether the copy is refreshed after this number of phases."""
        return phases % self.settings.refresh_every == 0

    def read(self, rows: Rows, *, per_microbatch: int, share_bins: bool) -> tuple[Rows, dict[str, float]]:
        """Return the rows with the columns list_index [rows, time], which `choices` needs, and allowed [rows, time],
        the number of allowed tokens; and metrics to log."""
        actions = rows.action_mask != 0
        indices = torch.where(actions.flatten(), actions.flatten().cumsum(0) - 1, 0).view(actions.shape)
        rows = rows.with_columns(list_index=indices)
        chunks: list[Chunk] = []

        def allowed(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
            return {"allowed": self._allowed(model, hidden, batch, chunks)}

        engine = self.masking.engine
        counts = forward_rows(engine, rows, allowed, per_microbatch=per_microbatch, share_bins=share_bins)["allowed"]
        if engine.grid.layout.copies > 1:
            shares: list[list[Chunk]] = [[] for _ in range(engine.grid.layout.copies)]
            dist.all_gather_object(shares, chunks, group=engine.grid.groups.dp_cp)
            chunks = [chunk for share in shares for chunk in share]
        if chunks:
            index, length, ids = zip(*chunks, strict=True)
            self.lists = TokenLists.of(index, length, ids, int(actions.sum())).to(engine.grid.device)
        return rows.with_columns(allowed=counts), {"rollout/allowed_tokens": float(counts[actions].mean())}

    def choices(self, batch: Microbatch) -> Choices | None:
        """Return the tokens that may be chosen at each state of a microbatch, on the last stage; None for all."""
        if self.settings.top_p >= 1:
            return None
        assert self.lists is not None
        return Choices(self.lists, batch.at_states(batch.rows["list_index"]))

    def _allowed(self, model: GPT, hidden: Tensor, batch: Microbatch, chunks: list[Chunk]) -> Tensor:
        """Add the allowed tokens of this vocabulary shard to `chunks`. Return how many there are in all shards, [bins,
        time]."""
        states, tokens, where = model.at_targets(hidden, batch.targets, batch.target_mask)
        indices, shard = model.slices.mine(batch.at_states(batch.rows["list_index"]))[where], model.shard
        counts = torch.zeros(len(indices), device=states.device)
        step = max(1, CHUNK_ELEMENTS_CPU // shard.rows)  # the same on all shards, which exchange every chunk's sums
        for begin in range(0, len(indices), step):
            rows = slice(begin, min(begin + step, len(indices)))
            chosen = nucleus(model.logits(states[rows]), self.settings.top_p, self.temperature, shard)
            local = tokens[rows] - shard.start
            mine = ((local >= 0) & (local < shard.valid)).nonzero()[:, 0]
            chosen[mine, local[mine]] = True
            length = chosen.sum(1)
            counts[rows] = length.float()
            if self.settings.top_p < 1:
                ids = chosen.nonzero()[:, 1].to(torch.int32)
                chunks.append((indices[rows].cpu(), length.cpu(), ids.cpu()))
        if shard.group is not None:
            dist.all_reduce(counts, group=shard.group)
        return model.laid_out(where, counts)
