"""The critic of PPO, which predicts returns: a head on the policy's trunk, a separate model, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megarl.algorithms import ppo_value_loss
from megarl.models.gpt import GPT
from megarl.parallel.engine import CountFn, Engine, ForwardFn, Outputs, Stats
from megarl.parallel.rows import Microbatch, Rows

Forward = Callable[[Engine, Rows, ForwardFn], Outputs]
"""Runs a function in forward passes of an engine over all rows and returns its outputs as columns [rows, time]."""


class Critic:
    """The interface of a critic for PPO. The base class does nothing; each kind of critic overrides what it needs.

    Attributes:
        engine: engine of a separate critic; None for the others.
        shares_trunk: whether the value loss is part of the policy's loss.
    """

    engine: Engine | None = None
    shares_trunk = False

    def values_beside(self, model: GPT, hidden: Tensor) -> Outputs:
        """Return what the critic adds to a forward pass of the policy, where the hidden states are shared: values
        [bins, time]."""
        return {}

    def values_of(self, rows: Rows, forward: Forward) -> Outputs:
        """Return the column `values` [rows, time], from forward passes of a separate critic."""
        return {}

    def loss_beside(
        self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]
    ) -> tuple[Tensor | float, Stats]:
        """Return the term that the critic adds to the policy's loss, and its statistics."""
        return 0.0, {}

    def train_step(self, microbatches: Sequence[Microbatch], count: CountFn) -> dict[str, float]:
        """Compute the gradients of a separate critic. Return its token counts and statistics."""
        return {}


class NoCritic(Critic):
    """No critic, for advantages that need no values."""


class SharedCritic(Critic):
    """A value head on the policy's trunk, trained with the policy."""

    shares_trunk = True

    def __init__(self, clip: float | None, weight: float) -> None:
        self.clip, self.weight = clip, weight

    def values_beside(self, model: GPT, hidden: Tensor) -> Outputs:
        """Return the values that the head predicts from the policy's hidden states."""
        return {"values": model.values(hidden)}

    def loss_beside(
        self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]
    ) -> tuple[Tensor | float, Stats]:
        """Return the weighted value loss and its statistics."""
        loss, stats = value_loss(model, hidden, batch, counts, self.clip)
        return self.weight * loss, stats


class SeparateCritic(Critic):
    """A separate model with its own optimizer."""

    def __init__(self, engine: Engine, clip: float | None) -> None:
        self.engine = self._own = engine
        self.clip = clip

    def values_of(self, rows: Rows, forward: Forward) -> Outputs:
        """Return the column `values` [rows, time], from forward passes of the critic's engine."""
        return forward(self._own, rows, lambda model, hidden, _: {"values": model.values(hidden)})

    def train_step(self, microbatches: Sequence[Microbatch], count: CountFn) -> dict[str, float]:
        """Compute the gradients of the value loss. Return the token counts and statistics."""
        return self._own.train_step(microbatches, self._loss, count)

    def _loss(self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
        return value_loss(model, hidden, batch, counts, self.clip)


def value_loss(
    model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float], clip: float | None
) -> tuple[Tensor, Stats]:
    """Return the clipped value loss, averaged over the response tokens of the global minibatch, and its statistics."""
    loss, stats = ppo_value_loss(
        batch.gather_rows(model.values(hidden)),
        batch.rows["values"],
        batch.rows["returns"],
        batch.rows.action_mask,
        clip=clip,
        denominator=counts["tokens"],
    )
    return loss, {
        "value/loss": loss,
        "value/clip_fraction": stats["clip_fraction"],
        "value/error": stats["value_error"],
    }
