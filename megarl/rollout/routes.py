"""The experts that computed a response, as rows and files need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.models.config import GPTConfig
from megarl.parallel.grid import Grid
from megarl.rollout.requests import Rollout


def with_all_layers(rollouts: Sequence[Rollout], config: GPTConfig, grid: Grid) -> list[Rollout]:
    """Return a replica's responses, which have the experts of this stage's layers, with those of all stages."""
    if grid.layout.pp == 1:
        return list(rollouts)
    stages: list[list[np.ndarray]] = [[] for _ in range(grid.layout.pp)]
    dist.all_gather_object(stages, [rollout.routes for rollout in rollouts], group=grid.groups.pp)
    order = np.argsort(_layers_by_stage(config, grid), kind="stable")
    return [
        replace(rollout, routes=np.concatenate(parts, axis=1)[:, order])
        for rollout, *parts in zip(rollouts, *stages, strict=True)
    ]


def _layers_by_stage(config: GPTConfig, grid: Grid) -> list[int]:
    """Return the numbers of the layers with experts, stage by stage in each stage's order."""
    pp, vpp = grid.layout.pp, grid.layout.vpp
    size = config.num_layers // (pp * vpp)
    numbers = []
    for stage in range(pp):
        for chunk in range(vpp):
            first = (chunk * pp + stage) * size
            numbers += [layer for layer in range(first + 1, first + size + 1) if config.has_experts(layer)]
    return numbers


def as_column(rollouts: Sequence[Rollout], time: int) -> Tensor | None:
    """Return the experts of the tokens of rows as a column [rows, time, layers x chosen] int16; -1 where none are
    recorded. None if no response has any."""
    recorded = {row: rollout.routes for row, rollout in enumerate(rollouts) if rollout.routes is not None}
    if not recorded:
        return None
    width = int(np.prod(next(iter(recorded.values())).shape[1:]))
    column = torch.full((len(rollouts), time, width), -1, dtype=torch.int16)
    for row, routes in recorded.items():
        column[row, : len(routes)] = torch.from_numpy(routes).flatten(1)
    return column
