"""The order in which prompts are used: all of them in random order, or from several sets with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megarl.config.sections.data import PromptDataConfig
from megarl.data.order import TrainBatches
from megarl.data.prompts import Prompt
from megarl.errors import DataError

BLOCK = 4096  # random numbers that are generated together


class PromptOrder(Protocol):
    """An endless stream of prompts, used phase by phase."""

    def rows(self, begin: int, count: int, phase: int) -> np.ndarray:
        """Return the indices [count] of prompts `begin`, `begin` + 1, ... of the stream, which `phase` uses."""

    def end_phase(self, used: int, phase: int) -> None:
        """Record that `used` prompts of the stream were used up to the end of `phase`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any], used: int) -> None:
        """Restore the state of a checkpoint, after `used` prompts."""


class Shuffled:
    """All prompts in random order, each once before any is repeated."""

    def __init__(self, count: int, seed: int) -> None:
        self.batches = TrainBatches(np.ones(count), 1, seed)

    def rows(self, begin: int, count: int, phase: int) -> np.ndarray:
        """Return the indices [count] of prompts `begin`, `begin` + 1, ... of the stream."""
        return self.batches.rows(begin, count)

    def end_phase(self, used: int, phase: int) -> None:
        """Do nothing: the stream follows from the seed."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which is empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], used: int) -> None:
        """Do nothing: the stream follows from the seed."""


class Mixture:
    """Prompts from several sets with weights. Each set has its own random order, and none of its prompts is repeated
    before all of them were used.

    The state is the number of prompts used so far, of each set and of all. So a resume with other weights changes the
    future and not the past.
    """

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
            sources: the indices of each set's prompts.
            weights: how often each set is used, relative to the others.
            seed: seed of the choice of sets and of their orders.
            final_weights: weights that are reached in a straight line; empty: the weights stay.
            over: number of phases after which they are reached.
        """
        self.sources, self.seed, self.over = sources, seed, over
        self.weights = _shares(weights)
        self.final = _shares(final_weights) if len(final_weights) else self.weights
        self.used, self.used_of_set = 0, np.zeros(len(sources), np.int64)
        self._orders = [
            Shuffled(len(source), seed + 7919 * number) if len(source) else None
            for number, source in enumerate(sources)
        ]

    def rows(self, begin: int, count: int, phase: int) -> np.ndarray:
        """Return the indices [count] of prompts `begin`, `begin` + 1, ... of the stream, which `phase` uses."""
        sets = self._sets(begin + count, phase)
        found = np.zeros(len(sets), np.int64)
        for number, (source, order) in enumerate(zip(self.sources, self._orders, strict=True)):
            positions = np.flatnonzero(sets == number)
            if len(positions):
                assert order is not None
                found[positions] = source[order.rows(int(self.used_of_set[number]), len(positions), phase)]
        return found[begin - self.used :]

    def end_phase(self, used: int, phase: int) -> None:
        """Record that `used` prompts of the stream were used up to the end of `phase`."""
        self.used_of_set += np.bincount(self._sets(used, phase), minlength=len(self.sources))
        self.used = used

    def state_dict(self) -> dict[str, Any]:
        """Return the number of prompts used of each set."""
        return {"used_of_set": self.used_of_set.tolist()}

    def load_state_dict(self, state: Mapping[str, Any], used: int) -> None:
        """Restore the state of a checkpoint, after `used` prompts. Sets start anew if their number has changed."""
        self.used = used
        used_of_set = state.get("used_of_set", ())
        if len(used_of_set) == len(self.sources):
            self.used_of_set = np.array(used_of_set, np.int64)

    def _sets(self, end: int, phase: int) -> np.ndarray:
        """Return the set of each prompt of the stream from the first unused one up to `end`, with a phase's weights."""
        moved = min(1.0, phase / self.over) if self.over else 0.0
        edges = np.cumsum((1 - moved) * self.weights + moved * self.final)
        blocks = range(self.used // BLOCK, (end - 1) // BLOCK + 1)
        uniform = [np.random.default_rng([self.seed, block, 1]).random(BLOCK) for block in blocks]
        first = self.used - blocks.start * BLOCK
        drawn = np.concatenate([np.empty(0), *uniform])[first : first + end - self.used]
        sets: np.ndarray = (drawn[:, None] * edges[-1] >= edges).sum(axis=1)
        return sets


def prompt_order(prompts: Sequence[Prompt], data: PromptDataConfig, seed: int, phases: int) -> PromptOrder:
    """Return the order of the training prompts.

    Args:
        prompts: all training prompts.
        data: the section `data`.
        seed: seed of the run.
        phases: number of phases of the run, over which the weights of `data.mixing` move by default.
    """
    mixing = data.mixing
    if mixing is None:
        return Shuffled(len(prompts), seed)
    of = np.array([prompt.source for prompt in prompts])
    sources = [np.flatnonzero(of == number) for number in range(len(data.train))]
    for number, source in enumerate(sources):
        used = [weights[number] for weights in (mixing.weights, mixing.final_weights) if weights]
        if not len(source) and any(used):
            raise DataError(
                f"{data.train[number]}: none of its prompts is left (see rollout.too_long), and data.mixing.weights="
                f"{mixing.weights} uses it: give it a weight of 0",
                key="data.mixing.weights",
                value=mixing.weights,
                where=data.train[number],
            )
    over = mixing.over_phases or phases
    return Mixture(sources, mixing.weights, seed, final_weights=mixing.final_weights, over=over)


def _shares(weights: Sequence[float]) -> np.ndarray:
    values = np.array(weights, dtype=np.float64)
    shares: np.ndarray = values / values.sum()
    return shares
