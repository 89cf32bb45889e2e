"""Train all cases of a suite and compare them, in processes of this machine or in those that a launcher started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megarl.command import process_number
from megarl.conformance.compare import Difference, compare, compare_starts
from megarl.conformance.features import Case, Reference, cases
from megarl.conformance.rules import refusal
from megarl.conformance.settings import Suite
from megarl.conformance.training import Outcomes, train_case
from megarl.errors import ConfigError, MegarlError
from megarl.parallel.worlds import WorldError, Worlds

PRELOAD = ("torch", "megarl.conformance.training")
"""What the processes of all cases import once."""
OK, FAILED, REFUSED = "ok", "FAIL", "refused"


@dataclass(frozen=True)
class Result:
    """What came out of a case.

    Attributes:
        case: the case.
        state: ok, FAIL or refused.
        differences: the largest difference of each kind of numbers.
        reason: why it was refused, or how it ended without numbers.
        seconds: wall-clock time of its training.
    """

    case: Case
    state: str
    differences: tuple[Difference, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def found(self) -> list[Difference]:
        """The differences that are no rounding."""
        return [one for one in self.differences if not one.is_rounding]


Train = Callable[..., Outcomes]
"""train(settings, world, same_ends=False) trains a model in so many processes."""


class _References:
    """The trainings in one process that cases are compared with, each made once.

    A case in one process that others are compared with is compared with the plain model until the first gradients are
    applied: so far neither frozen layers nor adapters make a difference, and a tied embedding has the gradients of both
    ends.
    """

    def __init__(self, train: Train) -> None:
        self._train = train
        self._made: dict[tuple[str, bool], Outcomes | Exception] = {}

    def prepare(self, case: Case, world: int) -> None:
        """Train what a case of so many processes is compared with. An error is raised where it is compared."""
        reference, same_ends = _compared_with(case, world)
        key = (reference.name, same_ends)
        if key not in self._made:
            try:
                self._made[key] = self._train(reference.settings, 1, same_ends)
            except (MegarlError, WorldError) as problem:
                self._made[key] = problem

    def differences(self, case: Case, world: int, found: Outcomes) -> tuple[Difference, ...]:
        """Compare a case of so many processes with its reference."""
        self.prepare(case, world)
        reference, same_ends = _compared_with(case, world)
        wanted = self._made[reference.name, same_ends]
        if isinstance(wanted, Exception):
            raise wanted
        return tuple((compare_starts if _is_reference(case, world) else compare)(found, wanted))


def _is_reference(case: Case, world: int) -> bool:
    """Return whether others are compared with the case."""
    return world == 1 and case.is_its_reference


def _compared_with(case: Case, world: int) -> tuple[Reference, bool]:
    """Return the reference of a case, and whether its output layer starts with the embedding's weights."""
    if not _is_reference(case, world):
        return case.reference, False
    start = case.started_from.keys
    return Case(tuple(key for key in start if key != "tied")).reference, "tied" in start


def run_here(suite: Suite, finished: Callable[[], None] = lambda: None) -> list[Result]:
    """Return the results of all cases, trained in processes that this one starts.

    Args:
        suite: the settings.
        finished: is called after each case.
    """
    worlds = Worlds(PRELOAD)

    def train(settings: Any, world: int, same_ends: bool = False) -> Outcomes:
        trained: Outcomes = worlds.call(
            world, suite.limit, train_case, settings, world, suite.steps, suite.limit, same_ends
        )
        return trained

    references = _References(train)
    results = []
    # Processes are started anew where their number changes: so references come first, and cases by their processes.
    reasons = {case: refusal(case) for case in sorted(cases(suite.only), key=lambda case: case.world)}
    try:
        for case in (case for case, reason in reasons.items() if reason is None):
            references.prepare(case, case.world)
        for case, reason in reasons.items():
            results.append(_result(case, train, references, reason))
            finished()
    finally:
        worlds.close()
    return results


def _result(case: Case, train: Train, references: _References, reason: str | None) -> Result:
    """Train a case and compare it. A process that fails or hangs is the case's failure."""
    if reason is not None:
        return Result(case, REFUSED, reason=reason)
    began = time.monotonic()
    try:
        found = train(case.settings, case.world)
        seconds = time.monotonic() - began
        return _compared(case, case.world, references, found, seconds)
    except ConfigError as problem:  # a rule that only the building of a model knows
        return Result(case, REFUSED, reason=str(problem))
    except (MegarlError, WorldError) as problem:
        return Result(case, FAILED, reason=str(problem), seconds=time.monotonic() - began)


def _compared(case: Case, world: int, references: _References, found: Outcomes, seconds: float) -> Result:
    differences = references.differences(case, world, found)
    state = OK if all(one.is_rounding for one in differences) else FAILED
    return Result(case, state, differences, seconds=seconds)


def run_given(suite: Suite) -> list[Result] | None:
    """Return the results of the cases that fit the world that a launcher started, on its first process.

    Replicas fill the world. An error of one process ends the command, as the launcher then stops the others.
    """
    world = int(os.environ["WORLD_SIZE"])
    trained: list[tuple[Case, Outcomes, float]] = []
    refused = []
    for case in cases(suite.only):
        reason = refusal(case, world)
        began = time.monotonic()
        try:
            found = None if reason else train_case(case.settings, world, suite.steps, suite.limit)
        except ConfigError as problem:
            reason, found = str(problem), None
        if reason:
            refused.append(Result(case, REFUSED, reason=reason))
        elif found is not None:
            trained.append((case, found, time.monotonic() - began))
    if dist.is_initialized():
        dist.destroy_process_group()
    if process_number() != 0:
        return None
    os.environ["WORLD_SIZE"] = "1"

    def train(settings: Any, size: int, same_ends: bool = False) -> Outcomes:
        alone = train_case(settings, size, suite.steps, suite.limit, same_ends)
        assert alone is not None
        return alone

    references = _References(train)
    return refused + [_compared(case, world, references, found, seconds) for case, found, seconds in trained]
