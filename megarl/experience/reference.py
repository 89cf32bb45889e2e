"""The reference model of the KL term: usually the policy's weights at the start of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from megarl.models.adapters import adapted, frozen_digests, switched_off
from megarl.parallel.digest import weights_digest
from megarl.parallel.engine import Engine
from megarl.parallel.rows import Rows

LogprobsOf = Callable[[Engine, Rows], Tensor]
"""Computes the log-probs [rows, time] of all rows' tokens under an engine's present weights, on every rank."""


class Reference(Protocol):
    """Computes log-probs of rows under the reference model."""

    def logprobs(self, rows: Rows) -> Tensor:
        """Return the log-probs [rows, time] of the rows' tokens, on every rank."""


class FirstWeights:
    """An engine's weights when this is made, which `restored` puts back for a while.

    New adapters change nothing, so that the first weights are those without adapters, and nothing is copied. Otherwise
    the trainable weights are copied to host memory: a policy with few of them has a small copy.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        linears = list(adapted(engine.models))
        changes = any(bool(linear.adapter.up.any()) for linear in linears)
        any_linears, changes = (any(flags) for flags in zip(*engine.grid.gather((bool(linears), changes)), strict=True))
        self.without_adapters = any_linears and not changes
        self.weights = None if self.without_adapters else engine.trainable_copy()  # empty where all layers are frozen

    def restored(self) -> AbstractContextManager[None]:
        """Return a context in which the engine computes with its first weights."""
        if self.weights is None:
            return switched_off(self.engine.models)
        return self.engine.with_weights(self.weights)

    @property
    def digest(self) -> str:
        """A digest of the first weights, before any of them has changed."""
        if not self.engine.grid.any_rank(bool(list(adapted(self.engine.models)))):
            return weights_digest(self.engine)
        found = frozen_digests(self.engine) | ({} if self.without_adapters else self.engine.digests())
        return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


class PolicyReference:
    """The policy with its first weights, which replace the later ones during each forward pass."""

    def __init__(self, engine: Engine, logprobs_of: LogprobsOf) -> None:
        self.engine, self._logprobs_of = engine, logprobs_of
        self.first = FirstWeights(engine)

    def logprobs(self, rows: Rows) -> Tensor:
        """Return the log-probs [rows, time] of the rows' tokens under the first weights, on every rank."""
        with self.first.restored():
            return self._logprobs_of(self.engine, rows)
