"""The reference: the policy that a run started from, or another that it is held close to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megarl.parallel.engine import Engine
from megarl.parallel.rows import Rows

LogprobsOf = Callable[[Engine, Rows], Tensor]
"""[rows, time] log-probs of the tokens of all rows under an engine's present weights, on every rank."""


class Reference(Protocol):
    """Says how likely the reference finds the tokens of rows."""

    def logprobs(self, rows: Rows) -> Tensor:
        """[rows, time] on every rank."""


class SwappedReference:
    """The weights that an engine has now, kept in host memory and put in the place of its later ones for each pass.

    Only what trains is kept, so a policy with few trainable layers has a small reference.
    """

    def __init__(self, engine: Engine, logprobs_of: LogprobsOf) -> None:
        self.engine, self._logprobs_of = engine, logprobs_of
        self.weights = engine.trainable_copy()  # empty on a stage of frozen layers

    def logprobs(self, rows: Rows) -> Tensor:
        """[rows, time] on every rank."""
        with self.engine.with_weights(self.weights):
            return self._logprobs_of(self.engine, rows)
