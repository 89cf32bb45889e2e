from collections.abc import Iterator
from contextlib import contextmanager


class CudaRNGStatesTracker:
    """A name that Megatron subclasses; megarl uses Megatron's own tracker."""


@contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    """Without FP8, nothing is different in a forward pass that is repeated."""
    yield
