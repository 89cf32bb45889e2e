"""The order in which prompts are drawn: through one set of prompts, or from several sets with weights.

Prompt k of the stream is a function of (seed, k) and the data alone, so that a resume needs only the number of prompts
that were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megarl.config.sections.data import PromptDataConfig
from megarl.data.order import TrainBatches
from megarl.data.prompts import Prompt
from megarl.errors import DataError

BLOCK = 4096  # draws that are decided together


class PromptOrder(Protocol):
    """An endless stream of prompts."""

    def rows(self, begin: int, count: int) -> np.ndarray:
        """Return the numbers [count] of the stream's prompts from its prompt `begin` on."""


class Mixture:
    """Draws from several sets of prompts, each of which is gone through in a random order of its own."""

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        weights: Sequence[float],
        seed: int,
        *,
        final_weights: Sequence[float] = (),
        over: int = 0,
    ) -> None:
        """
        Args:
            sources: of each set, the numbers of its prompts.
            weights: how often each set is drawn from, relative to the others.
            seed: seed of the draws and of the orders.
            final_weights: weights that are reached in a straight line; empty: the weights stay.
            over: number of draws after which they are reached.
        """
        self.sources, self.seed, self.over = sources, seed, over
        self.weights = _shares(weights)
        self.final = _shares(final_weights) if len(final_weights) else self.weights
        self._orders = [
            TrainBatches(np.ones(len(source)), 1, seed + 7919 * number) if len(source) else None
            for number, source in enumerate(sources)
        ]
        self._before = [np.zeros(len(sources), np.int64)]  # of each block, the draws from each set before it

    def rows(self, begin: int, count: int) -> np.ndarray:
        """Return the numbers [count] of the prompts from draw `begin` on."""
        pieces = []
        for block in range(begin // BLOCK, (begin + count - 1) // BLOCK + 1):
            chosen = self._chosen(block)
            first = max(begin - block * BLOCK, 0)
            pieces.append(self._drawn(block, chosen)[first : begin + count - block * BLOCK])
        return np.concatenate(pieces)

    def _chosen(self, block: int) -> np.ndarray:
        """Return the set [BLOCK] of each draw of a block."""
        at = block * BLOCK + np.arange(BLOCK)
        moved = np.clip(at / self.over, 0, 1)[:, None] if self.over else np.zeros((BLOCK, 1))
        edges = np.cumsum((1 - moved) * self.weights + moved * self.final, axis=1)
        draws = np.random.default_rng([self.seed, block]).random(BLOCK)[:, None] * edges[:, -1:]
        chosen: np.ndarray = (draws >= edges).sum(axis=1)
        return chosen

    def _drawn(self, block: int, chosen: np.ndarray) -> np.ndarray:
        """Return the prompts [BLOCK] of a block."""
        for earlier in range(len(self._before), block + 1):
            counts = np.bincount(self._chosen(earlier - 1), minlength=len(self.sources))
            self._before.append(self._before[-1] + counts)
        drawn = np.zeros(BLOCK, np.int64)
        for number, (source, order) in enumerate(zip(self.sources, self._orders, strict=True)):
            places = np.flatnonzero(chosen == number)
            if len(places):
                assert order is not None
                drawn[places] = source[order.rows(int(self._before[block][number]), len(places))]
        return drawn


def prompt_order(prompts: Sequence[Prompt], data: PromptDataConfig, seed: int, over: int) -> PromptOrder:
    """Return the order of the training prompts.

    Args:
        prompts: all training prompts.
        data: the section `data`.
        seed: seed of the run.
        over: number of prompts that the run will draw, over which the weights of `data.mixing` move.
    """
    mixing = data.mixing
    if mixing is None:
        return TrainBatches(np.ones(len(prompts)), 1, seed)
    of = np.array([prompt.source for prompt in prompts])
    sources = [np.flatnonzero(of == number) for number in range(len(data.train))]
    for number, source in enumerate(sources):
        used = [weights[number] for weights in (mixing.weights, mixing.final_weights) if weights]
        if not len(source) and any(used):
            raise DataError(
                f"{data.train[number]}: none of its prompts is left (see rollout.too_long), and data.mixing.weights="
                f"{mixing.weights} draws from it: give it a weight of 0",
                key="data.mixing.weights",
                value=mixing.weights,
                where=data.train[number],
            )
    return Mixture(sources, mixing.weights, seed, final_weights=mixing.final_weights, over=over)


def _shares(weights: Sequence[float]) -> np.ndarray:
    values = np.array(weights, dtype=np.float64)
    shares: np.ndarray = values / values.sum()
    return shares
