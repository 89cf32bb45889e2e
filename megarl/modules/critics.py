"""The critic of PPO, which expects returns: a head on the policy's trunk, a separate model, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megarl.algorithms import ppo_value_loss
from megarl.models.gpt import GPT
from megarl.parallel.engine import CountFn, Engine, ForwardFn, Outputs, Stats
from megarl.parallel.rows import Microbatch, Rows

Forward = Callable[[Engine, Rows, ForwardFn], Outputs]
"""Columns that a function gives of every row, from passes of an engine."""


class Critic:
    """What PPO asks of a critic. By default it does nothing; each kind of critic fills in its part.

    Attributes:
        engine: the engine of a separate critic.
        shares_trunk: whether its loss is a part of the policy's.
    """

    engine: Engine | None = None
    shares_trunk = False

    def values_beside(self, model: GPT, hidden: Tensor) -> Outputs:
        """Return what a pass of the policy gives besides its log-probs."""
        return {}

    def values_of(self, rows: Rows, forward: Forward) -> Outputs:
        """Return the column of values, from passes of the separate critic."""
        return {}

    def loss_beside(
        self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]
    ) -> tuple[Tensor | float, Stats]:
        """Return what is added to the policy's loss, and its statistics."""
        return 0.0, {}

    def train_step(self, microbatches: Sequence[Microbatch], count: CountFn) -> dict[str, float]:
        """Compute the gradients of the separate critic; return the counts and the statistics."""
        return {}


class NoCritic(Critic):
    """For advantages that need no values."""


class SharedCritic(Critic):
    """A value head on the policy's trunk, trained with the policy."""

    shares_trunk = True

    def __init__(self, clip: float | None, weight: float) -> None:
        self.clip, self.weight = clip, weight

    def values_beside(self, model: GPT, hidden: Tensor) -> Outputs:
        return {"values": model.values(hidden)}

    def loss_beside(
        self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]
    ) -> tuple[Tensor | float, Stats]:
        loss, stats = value_loss(model, hidden, batch, counts, self.clip)
        return self.weight * loss, stats


class SeparateCritic(Critic):
    """A separate model with its own optimizer."""

    def __init__(self, engine: Engine, clip: float | None) -> None:
        self.engine = self._own = engine
        self.clip = clip

    def values_of(self, rows: Rows, forward: Forward) -> Outputs:
        return forward(self._own, rows, lambda model, hidden, _: {"values": model.values(hidden)})

    def train_step(self, microbatches: Sequence[Microbatch], count: CountFn) -> dict[str, float]:
        return self._own.train_step(microbatches, self._loss, count)

    def _loss(self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
        return value_loss(model, hidden, batch, counts, self.clip)


def value_loss(
    model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float], clip: float | None
) -> tuple[Tensor, Stats]:
    """Return the clipped value loss, the mean over the response tokens of the global minibatch."""
    loss, found = ppo_value_loss(
        batch.gather_rows(model.values(hidden)),
        batch.rows["values"],
        batch.rows["returns"],
        batch.rows.action_mask,
        clip=clip,
        denominator=counts["tokens"],
    )
    return loss, {
        "value/loss": loss,
        "value/clip_fraction": found["clip_fraction"],
        "value/error": found["value_error"],
    }
