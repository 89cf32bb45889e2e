"""Token sequences to train on, and the input of one forward pass.

`Rows` contain one sequence per row and are used by algorithms, losses and data sets. `MicrobatchPlan` lays them out as
`Microbatch`es, the input of models and losses. Both are immutable: a step that adds a column returns new rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on


@dataclass(frozen=True, eq=False)
class Rows:
    """Token sequences to train on, right-padded.

    Attributes:
        tokens: [rows, time] long.
        lengths: [rows] long, tokens of each row without padding.
        action_mask: [rows, time] float32, 1 on the policy's actions, or where the loss applies; 0 on prompts,
            environment text, padding and the first token, which has no prediction.
        per_token: more columns [rows, time], such as rollout_logprobs, old_logprobs, ref_logprobs, values, rewards,
            advantages and returns; of rows that hold several documents, positions and segment_ids.
        per_row: more columns [rows], such as group (the prompt that a response belongs to), prompt_tokens (its length)
            and truncated.
    """

    tokens: Tensor
    lengths: Tensor
    action_mask: Tensor
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_row: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def prompts(self) -> Tensor:
        """[rows] long, tokens before the first action: the column prompt_tokens, or as the action mask has it."""
        if "prompt_tokens" in self:
            return self["prompt_tokens"].long()
        acts = self.action_mask != 0
        first = torch.where(acts.any(dim=1), acts.long().argmax(dim=1), self.lengths - 1)
        return first.clamp(min=1)

    def __contains__(self, name: str) -> bool:
        return name in self.per_token or name in self.per_row

    def __getitem__(self, name: str) -> Tensor:
        """Return the column of this name: [rows, time] or [rows]."""
        return self.per_token[name] if name in self.per_token else self.per_row[name]

    def with_columns(self, **columns: Tensor) -> Self:
        """Return these rows with the given columns added or replaced: [rows, time], [rows, time, ...] or [rows]."""
        per_token, per_row = dict(self.per_token), dict(self.per_row)
        for name, column in columns.items():
            if name in ("tokens", "lengths", "action_mask"):
                raise ValueError(f"{name} is not an additional column: use dataclasses.replace")
            if column.shape[:2] != self.tokens.shape and column.shape != self.lengths.shape:
                raise ValueError(f"{name} has shape {list(column.shape)} and the rows {list(self.tokens.shape)}")
            (per_token if column.dim() >= 2 else per_row)[name] = column
        return replace(self, per_token=per_token, per_row=per_row)

    def take(self, indices: Tensor) -> Self:
        """Return the rows at these indices, in the order of the indices."""
        return replace(
            self,
            tokens=self.tokens[indices],
            lengths=self.lengths[indices],
            action_mask=self.action_mask[indices],
            per_token={name: column[indices] for name, column in self.per_token.items()},
            per_row={name: column[indices] for name, column in self.per_row.items()},
        )

    def to(self, device: torch.device) -> Self:
        """Return these rows with all columns on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            action_mask=self.action_mask.to(device, non_blocking=True),
            per_token={name: column.to(device, non_blocking=True) for name, column in self.per_token.items()},
            per_row={name: column.to(device, non_blocking=True) for name, column in self.per_row.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all columns by name, including tokens, lengths and action_mask."""
        own = {"tokens": self.tokens, "lengths": self.lengths, "action_mask": self.action_mask}
        return {**own, **self.per_token, **self.per_row}


class RowSource(Protocol):
    """A source of rows: `Rows` themselves, or a data set that builds them on demand."""

    @property
    def lengths(self) -> Tensor | np.ndarray:
        """Number of tokens of each row, [rows]."""

    def take(self, indices: Tensor) -> Rows:
        """Return the rows at these indices, in the order of the indices."""


@dataclass(frozen=True, eq=False)
class Origins:
    """Where the tokens of a microbatch come from, for the router of a mixture of experts.

    Attributes:
        rows: [bins, time] long, the row of each token within the microbatch, from 1; 0 in padding.
        total: number of tokens that are read in the microbatches of all replicas together.
        copies: number of ranks that hold the same weights, whose gradients are averaged.
        routes: [bins, time, layers with experts x chosen], the experts that each token is computed by, -1 where the
            router chooses; None: it chooses for all.
    """

    rows: Tensor
    total: float
    copies: int
    routes: Tensor | None = None

    def to(self, device: torch.device) -> Origins:
        """Return the same on a device."""
        routes = None if self.routes is None else self.routes.to(device, non_blocking=True)
        return replace(self, rows=self.rows.to(device, non_blocking=True), routes=routes)


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelInputs:
    """The input of a model.

    Attributes:
        tokens: [bins, time] long; 0 in padding.
        positions: [bins, time] long, position of each token in its row or document, from 0.
        segment_ids: [bins, time] long if bins contain several rows: 1, 2, ... for the rows of a bin, 0 in padding.
            Tokens attend to their own segment only.
        encoder: what the encoder of an encoder-decoder reads, [bins, its own time], with segment_ids. The other fields
            are the decoder's, whose first token of a row is replaced by the model's start token.
        origins: the row of each token; None where a model that generates reads them.
    """

    tokens: Tensor
    positions: Tensor
    segment_ids: Tensor | None = None
    encoder: ModelInputs | None = None
    origins: Origins | None = None

    @property
    def time(self) -> int:
        """Number of positions of a bin in the hidden states that pipeline stages exchange."""
        return self.tokens.shape[1] + (0 if self.encoder is None else self.encoder.tokens.shape[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Microbatch(ModelInputs):
    """The input and the targets of one forward pass of a replica, and the rows that they come from.

    `targets[b, t]` is the token that the state at `[b, t]` predicts. Only the plan shifts by one; models and losses
    do not.

        row                A  B  C  D            input tokens    A  B  C
        columns of rows    0  1  2  3            targets         B  C  D

    Attributes:
        targets: [bins, time] long, the token after each input token.
        target_mask: [bins, time] float32, the action mask of the targets.
        rows: the rows of this microbatch, on the same device. Where a replica has none left, these are filler rows of
            length 0 with an empty action mask: a loss over whole rows must mask with `rows.lengths > 0`.
        token_index: [rows, time of rows] long, for each token of each row the index of the state that predicts it in
            the flat [bins, time]; -1 for first tokens and padding.
        last_index: [rows] long, index of the state after the last token of the row; -1 where the plan does not read
            the last token.
    """

    targets: Tensor
    target_mask: Tensor
    rows: Rows
    token_index: Tensor
    last_index: Tensor

    def gather_rows(self, outputs: Tensor) -> Tensor:
        """Gather outputs [bins, time] into rows [rows, time]: the output of the state that predicts each token; 0 at
        first tokens and in padding."""
        return gather(outputs, self.token_index)

    def at_states(self, column: Tensor) -> Tensor:
        """Lay a column [rows, time] of the rows out as [bins, time]: each entry at the state that predicts its token, 0
        elsewhere. The inverse of `gather_rows`."""
        flat = column.new_zeros(self.tokens.numel())
        known = self.token_index >= 0
        flat[self.token_index[known]] = column[known]
        return flat.view(self.tokens.shape)

    def gather_states(self, outputs: Tensor) -> Tensor:
        """Gather outputs [bins, time] into rows [rows, time]: the output of the state after each token; 0 in padding
        and where a token was not read."""
        return gather(outputs, states_index(self.token_index, self.last_index, self.rows.lengths))

    def to(self, device: torch.device) -> Self:
        """Return this microbatch with all tensors, including those of its rows, on a device."""
        moved = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        encoder = self.encoder
        if encoder is not None:
            encoder = ModelInputs(
                tokens=encoder.tokens.to(device, non_blocking=True),
                positions=encoder.positions.to(device, non_blocking=True),
                segment_ids=None if encoder.segment_ids is None else encoder.segment_ids.to(device, non_blocking=True),
            )
        origins = None if self.origins is None else self.origins.to(device)
        return replace(self, rows=self.rows.to(device), encoder=encoder, origins=origins, **moved)

    def without_routes(self) -> Self:
        """Return this microbatch for a model whose router chooses all experts."""
        if self.origins is None or self.origins.routes is None:
            return self
        return replace(self, origins=replace(self.origins, routes=None))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; names of the rows' tensors begin with `rows.`."""
        own = {item.name: value for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)}
        return {**own, **{f"rows.{name}": column for name, column in self.rows.tensors().items()}}


def states_index(token_index: Tensor, last_index: Tensor, lengths: Tensor) -> Tensor:
    """Return [rows, time], for each token of each row the index of the state after it; -1 in padding.

    Args:
        token_index: [rows, time], the index of the state that predicts each token.
        last_index: [rows], the index of the state after the last token of each row.
        lengths: [rows], tokens of each row.
    """
    index = F.pad(token_index[:, 1:], (0, 1), value=-1)
    last = (lengths - 1).clamp(min=0)[:, None]
    return index.scatter(1, last, last_index[:, None])


def gather(outputs: Tensor, index: Tensor) -> Tensor:
    """Return the flat outputs at an index tensor of any shape, and 0 where the index is -1."""
    return torch.where(index >= 0, outputs.flatten()[index.clamp(min=0)], 0)
