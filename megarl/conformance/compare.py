"""How far the outcome of a case is from that of its reference, beside what counts as rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.conformance.training import Outcome, Outcomes
from megarl.parallel.whole import Copies

LOSS, NORM, OWN_NORM = "loss and statistics", "gradient norm", "norm of the gathered gradients"
OUTPUTS, FIRST, LAST = "log-probs and values", "gradients, first step", "gradients, last step"
PARAMETERS, MOVED, UNREACHED = "parameters", "frozen parameters", "parameters without a gradient"
LIMITS = {
    LOSS: (1e-5, 1e-6),
    NORM: (1e-5, 1e-6),
    OWN_NORM: (1e-5, 1e-6),
    OUTPUTS: (1e-5, 1e-5),
    FIRST: (1e-5, 1e-6),
    LAST: (5e-5, 1e-6),  # of weights that differ by the rounding of earlier updates
    PARAMETERS: (1e-5, 1e-6),
    MOVED: (0.0, 0.0),
    UNREACHED: (0.0, 0.0),
}
"""(relative, absolute) differences in float32 that count as rounding. Those of a gradient or of a parameter are
relative to its largest value, as its small values are sums of larger ones."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of a kind of numbers, measured by its limit.

    Attributes:
        objective: sft or ppo.
        quantity: the kind of numbers.
        size: the difference; NaN if one of the two is not finite.
        limit: the largest that counts as rounding.
        where: the name of the tensor or statistic.
    """

    objective: str
    quantity: str
    size: float
    limit: float
    where: str

    @property
    def is_rounding(self) -> bool:
        """Whether the two agree. NaN is a difference."""
        return self.size <= self.limit

    @property
    def excess(self) -> float:
        """The difference as a multiple of its limit."""
        if self.size == 0:
            return 0.0
        return self.size / self.limit if math.isfinite(self.size) and self.limit > 0 else math.inf


def compare(found: Outcomes, wanted: Outcomes) -> list[Difference]:
    """Return the largest difference of each kind of numbers, for each objective."""
    differences = []
    for name, ours in found.items():
        theirs = wanted[name]
        parts = [*_numbers(name, ours, theirs), *_gradients(name, LAST, ours.last_gradients, theirs.last_gradients)]
        parts += _gradients(name, FIRST, ours.first_gradients, theirs.first_gradients)
        parts += _gradients(name, PARAMETERS, ours.parameters, theirs.parameters)
        differences += _largest([*parts, *_of_itself(name, ours)])
    return differences


def compare_starts(found: Outcomes, wanted: Outcomes) -> list[Difference]:
    """Return the largest differences of the first step, where the two learn the same until its gradients are applied.

    Gradients are compared of the parameters that both train.
    """
    differences = []
    for name, ours in found.items():
        theirs = wanted[name]
        both = theirs.first_gradients.keys() & ours.first_gradients.keys()
        parts = [*_numbers(name, _first(ours), _first(theirs)), *_of_itself(name, ours)]
        parts += _gradients(
            name,
            FIRST,
            {tensor: ours.first_gradients[tensor] for tensor in both},
            {tensor: theirs.first_gradients[tensor] for tensor in both},
        )
        differences += _largest(parts)
    return differences


def _first(outcome: Outcome) -> Outcome:
    """Return what the first step gave, before its gradients were applied."""
    return Outcome(stats={name: values[:1] for name, values in outcome.stats.items()}, outputs=outcome.outputs)


def _numbers(objective: str, ours: Outcome, theirs: Outcome) -> Iterator[Difference]:
    """Yield the differences of statistics, norms and outputs."""
    yield from _missing(objective, LOSS, ours.stats, theirs.stats)
    for name in ours.stats.keys() & theirs.stats.keys():
        yield from _series(objective, LOSS, name, ours.stats[name], theirs.stats[name])
    yield from _series(objective, NORM, "the norm", ours.norms, theirs.norms)
    yield from _missing(objective, OUTPUTS, ours.outputs, theirs.outputs)
    for name in ours.outputs.keys() & theirs.outputs.keys():
        relative, absolute = LIMITS[OUTPUTS]
        wanted = theirs.outputs[name]
        sizes, limits = (ours.outputs[name] - wanted).abs(), relative * wanted.abs() + absolute
        worst = int((sizes / limits).nan_to_num(nan=math.inf).argmax())
        yield Difference(objective, OUTPUTS, float(sizes.flatten()[worst]), float(limits.flatten()[worst]), name)


def _series(
    objective: str, quantity: str, name: str, ours: Sequence[float], theirs: Sequence[float]
) -> Iterator[Difference]:
    relative, absolute = LIMITS[quantity]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        yield Difference(objective, quantity, abs(a - b), relative * abs(b) + absolute, f"{name}, step {step}")


def _gradients(objective: str, quantity: str, ours: Copies, theirs: Copies) -> Iterator[Difference]:
    """Yield the differences of whole tensors, of each all copies."""
    relative, absolute = LIMITS[quantity]
    yield from _missing(objective, quantity, ours, theirs)
    for name in ours.keys() & theirs.keys():
        wanted = theirs[name][0]
        limit = relative * float(wanted.abs().max()) + absolute
        for number, copy in enumerate(ours[name], 1):
            where = name if len(ours[name]) == 1 else f"{name}, copy {number} of {len(ours[name])}"
            yield Difference(objective, quantity, _distance(copy, wanted), limit, where)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else torch.nan


def _of_itself(objective: str, ours: Outcome) -> Iterator[Difference]:
    """Yield what must be true of a training alone."""
    yield from _series(objective, OWN_NORM, "the norm", ours.norms, ours.own_norms)
    for name, change in ours.moved.items():
        yield Difference(objective, MOVED, change, 0.0, name)
    for name in ours.unreached:
        yield Difference(objective, UNREACHED, torch.nan, 0.0, name)


def _missing(
    objective: str, quantity: str, ours: Mapping[str, object], theirs: Mapping[str, object]
) -> Iterator[Difference]:
    """Yield what only one of the two has."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        here = "has none in one process" if name in ours else "is missing"
        yield Difference(objective, quantity, torch.nan, 0.0, f"{name} {here}")


def _largest(differences: Iterable[Difference]) -> list[Difference]:
    """Return the difference of each kind that exceeds its limit most, or comes closest to it."""
    worst: dict[str, Difference] = {}
    for one in differences:
        if one.quantity not in worst or one.excess > worst[one.quantity].excess:
            worst[one.quantity] = one
    return [worst[quantity] for quantity in LIMITS if quantity in worst]
