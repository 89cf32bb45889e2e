"""Replicas that share experts make as many passes as each other while they generate, each over its own responses.

An expert layer exchanges tokens with the other replicas of its expert-parallel group, so a pass of one needs a pass of
all. Before each pass a replica says that it makes one; a replica without responses serves the passes of the others
until nobody makes any. Passes over prompts and decoding steps may meet: an exchange takes any number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megarl.models.config import GPTConfig
from megarl.models.experts import expert_layers
from megarl.models.gpt import GPT
from megarl.parallel.grid import Grid


class Lockstep:
    """The passes of one model on this stage, in step with the stage's of the other replicas."""

    def __init__(self, models: Sequence[GPT], grid: Grid) -> None:
        self.layers = list(expert_layers(models).values())
        self.group, self.device = grid.groups.ep, grid.device

    def begin_pass(self) -> None:
        """Say that this replica makes a pass; call it before each one."""
        self._active(1)

    def serve(self) -> bool:
        """Take part in a pass of the others without tokens of one's own. Return False if none of them makes one."""
        if not self._active(0):
            return False
        for layer in self.layers:
            layer.serve()
        return True

    def _active(self, mine: int) -> int:
        """Return how many replicas make a pass."""
        count = torch.tensor([mine], device=self.device)
        dist.all_reduce(count, group=self.group)
        return int(count)


def lockstep_of(models: Sequence[GPT], config: GPTConfig, grid: Grid) -> Lockstep | None:
    """Return what keeps the passes of a model in step; None where no experts are shared."""
    return Lockstep(models, grid) if config.experts is not None and grid.layout.ep > 1 else None


def serve_until_done(locksteps: Sequence[Lockstep | None]) -> None:
    """Serve the passes of the other replicas, of each model in turn, until they have finished their responses."""
    shared = [one for one in locksteps if one is not None]
    while shared and all(one.serve() for one in shared):
        pass
