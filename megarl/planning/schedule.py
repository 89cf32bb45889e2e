"""When each pipeline stage runs which microbatch: Megatron's order, with the seconds that the plan takes for a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.parallel.layout import Layout
from megarl.parallel.pipeline_order import Pass, order_of_passes


@dataclass(frozen=True)
class Timed:
    """A pass with its beginning and its end, in seconds since the first one."""

    of: Pass
    start: float
    end: float


def schedule(layout: Layout, microbatches: int, forward: float, backward: float) -> list[list[Timed]]:
    """Return the passes of every stage in an optimizer step.

    A pass begins when its stage is free and the neighbouring stage has sent its input: activations of the stage before
    in a forward pass, gradients of the stage after in a backward pass.

    Args:
        layout: the layout.
        microbatches: number of microbatches in the step.
        forward, backward: seconds of a microbatch on all layers of a stage.
    """
    orders = [order_of_passes(layout, stage, microbatches) for stage in range(layout.pp)]
    timed: list[list[Timed]] = [[] for _ in orders]
    ends: dict[tuple[int, Pass], float] = {}
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, order in enumerate(orders):
            while len(timed[stage]) < len(order):
                one = order[len(timed[stage])]
                needed = _needed(layout, stage, one)
                if needed is not None and needed not in ends:
                    break
                free = timed[stage][-1].end if timed[stage] else 0.0
                start = max(free, ends[needed] if needed is not None else 0.0)
                ends[stage, one] = end = start + (backward if one.backward else forward) / layout.vpp
                timed[stage].append(Timed(one, start, end))
                left -= 1
        assert left < before, "the order of the passes waits for itself"
    return timed


def span(timed: Sequence[Sequence[Timed]]) -> float:
    """Return the seconds from the first pass to the last."""
    return max(one.end for stage in timed for one in stage)


def most_in_flight(timed: Sequence[Timed], chunks: int) -> float:
    """Return how many microbatches a stage keeps activations of at most, in units of all its layers."""
    held = most = 0
    for one in timed:
        held += -1 if one.of.backward else 1
        most = max(most, held)
    return most / chunks


def _needed(layout: Layout, stage: int, one: Pass) -> tuple[int, Pass] | None:
    """Return the pass whose output a pass reads, with its stage; None for the first of all."""
    virtual = one.chunk * layout.pp + stage
    last = layout.pp * layout.vpp - 1
    if one.backward and virtual == last:
        return stage, Pass(one.microbatch, one.chunk, backward=False)
    neighbour = virtual + (1 if one.backward else -1)
    if neighbour < 0:
        return None
    return neighbour % layout.pp, Pass(one.microbatch, neighbour // layout.pp, one.backward)
