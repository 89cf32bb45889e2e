"""The optimizers of all engines together: as the one that Lightning sees, and what saving their state takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megarl.logging import get_logger
from megarl.parallel.engine import Engine
from megarl.parallel.optimizer import STATES

log = get_logger(__name__)


class Optimizers(torch.optim.Optimizer):
    """All engines' Megatron optimizers as the one that Lightning counts steps of.

    A step moves the engines that have been given gradients since the last one. Learning rates are Megatron's schedule,
    stepped here too, so that there is one count of steps.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = [engine for engine in engines if engine.optimizer is not None]
        # Lightning wants a torch optimizer with parameters; the real ones are inside Megatron's buffers.
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {"lr": 0.0})
        self.grad_norms: dict[str, float] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = closure() if closure is not None else None
        self.grad_norms = {engine.name: engine.apply_gradients() for engine in self.engines if engine.has_gradients}
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        for engine in self.engines:
            engine.zero_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: optimizer state is sharded and travels with the engines' checkpoints."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, as in `state_dict`."""


def save_bytes(engines: Sequence[Engine]) -> int:
    """Host memory that a save takes on this rank at its fullest: Megatron's optimizer gathers every replica's part.

    Of each number that trains there are three in float32, and, where there are several replicas, one of the three once
    more while its padding is put back.
    """
    total = largest = 0
    for engine in engines:
        if engine.optimizer is not None:
            sizes = [buffer.numel for chunk in engine.chunks for buffer in chunk.buffers]
            total += sum(sizes)
            largest = max([largest, *sizes]) if engine.grid.layout.dp > 1 else largest
    return 4 * (len(STATES) * total + largest)


def warn_of_save_memory(needed: int, ranks: int, available: int) -> None:
    """Warn before the first save where the host memory of a machine is too small for those of its ranks.

    Args:
        needed: bytes of a rank.
        ranks: of this machine.
        available: bytes of this machine's memory that are free.
    """
    if needed * ranks > available:
        log.warning(
            "a checkpoint takes %.0f GiB of host memory on this machine (%s ranks of %.1f GiB), and %.0f are free: "
            "use a larger parallel.tp or parallel.pp, or fewer processes on a machine",
            needed * ranks / 2**30,
            ranks,
            needed / 2**30,
            available / 2**30,
        )
