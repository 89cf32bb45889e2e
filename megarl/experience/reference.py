"""The reference model of the KL term: usually the policy's weights at the start of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megarl.parallel.engine import Engine
from megarl.parallel.rows import Rows

LogprobsOf = Callable[[Engine, Rows], Tensor]
"""Computes the log-probs [rows, time] of all rows' tokens under an engine's present weights, on every rank."""


class Reference(Protocol):
    """Computes log-probs of rows under the reference model."""

    def logprobs(self, rows: Rows) -> Tensor:
        """Return the log-probs [rows, time] of the rows' tokens, on every rank."""


class SwappedReference:
    """A copy of an engine's present weights in host memory, which replaces the later weights during each forward pass.

    Only trainable weights are copied, so a policy with few trainable layers has a small reference.
    """

    def __init__(self, engine: Engine, logprobs_of: LogprobsOf) -> None:
        self.engine, self._logprobs_of = engine, logprobs_of
        self.weights = engine.trainable_copy()  # empty on a pipeline stage of frozen layers

    def logprobs(self, rows: Rows) -> Tensor:
        """Return the log-probs [rows, time] of the rows' tokens under the copied weights, on every rank."""
        with self.engine.with_weights(self.weights):
            return self._logprobs_of(self.engine, rows)
