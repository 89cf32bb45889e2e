"""The optimizers of all engines as one optimizer for Lightning, and the host memory that saving them needs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megarl.logging import get_logger
from megarl.parallel.engine import Engine
from megarl.parallel.optimizer import STATES

log = get_logger(__name__)


class Optimizers(torch.optim.Optimizer):
    """All engines' Megatron optimizers as one optimizer whose steps Lightning counts.

    A step updates the engines that have new gradients since the last step. It also advances Megatron's learning-rate
    schedules, so that there is one step count.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = [engine for engine in engines if engine.optimizer is not None]
        # Lightning expects a torch optimizer with parameters; the real ones are inside Megatron's buffers.
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {"lr": 0.0})
        self.grad_norms: dict[str, float] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Apply the gradients of every engine that has some; record the gradient norms by engine name."""
        result = closure() if closure is not None else None
        self.grad_norms = {engine.name: engine.apply_gradients() for engine in self.engines if engine.has_gradients}
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all engines; `set_to_none` has no effect on Megatron's buffers."""
        for engine in self.engines:
            engine.zero_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: optimizer state is sharded and saved with the engines' checkpoints."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing, as in `state_dict`."""


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Set the learning rate of an engine's next step; the schedule sets that of the step after it."""
    assert engine.optimizer is not None
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def save_bytes(engines: Sequence[Engine]) -> int:
    """Return the peak host memory of a save on this rank: Megatron's optimizer gathers the state of all replicas.

    Each trainable value has three float32 numbers: itself and Adam's moments (other optimizers have fewer, and Megatron
    gathers zeros instead). With several replicas, one of the three is held once more for the largest buffer while its
    padding is restored.
    """
    total = largest = 0
    for engine in engines:
        if engine.optimizer is not None:
            buffers = [buffer for chunk in engine.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
            sizes = [buffer.numel for buffer in buffers]
            total += sum(sizes)
            largest = max([largest, *sizes]) if engine.grid.layout.copies > 1 else largest
    return 4 * (len(STATES) * total + largest)


def warn_of_save_memory(needed: int, ranks: int, available: int) -> None:
    """Warn before the first save if the free host memory of a machine is too small for the saves of its ranks.

    Args:
        needed: bytes per rank.
        ranks: number of ranks on this machine.
        available: bytes of free memory on this machine.
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
