"""The suite in processes: cases agree, and one that fails, hangs or is refused does not stop the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megarl.conformance import running
from megarl.conformance.compare import PARAMETERS
from megarl.conformance.running import FAILED, OK, REFUSED, run_here
from megarl.conformance.settings import Suite
from megarl.conformance.training import Outcomes
from megarl.errors import ConfigError
from megarl.parallel.worlds import WorldError


def test_cases_of_several_kinds_give_the_numbers_of_one_process() -> None:
    """Two processes, one process, and a model that is compared with a simpler one."""
    done: list[None] = []
    results = run_here(Suite(only=("dp", "tied"), steps=2), lambda: done.append(None))
    assert [(result.case.name, result.state) for result in results] == [("tied", OK), ("dp", OK), ("dp+tied", OK)]
    assert all(not result.found and result.differences for result in results)
    assert any(one.quantity == PARAMETERS and one.size > 0 for one in results[1].differences)
    assert len(done) == len(results)


class Trainings:
    """In the place of processes: an outcome for every call, or what a call of so many processes raises."""

    def __init__(self, raised: Callable[[int], Exception | None]) -> None:
        self.raised, self.calls = raised, 0

    def call(self, size: int, limit_s: float, function: Any, settings: Any, *rest: Any) -> Outcomes:
        self.calls += 1
        problem = self.raised(size)
        if problem is not None:
            raise problem
        return {}

    def close(self) -> None: ...


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainings], Trainings]:
    def put(trainings: Trainings) -> Trainings:
        monkeypatch.setattr(running, "Worlds", lambda preload: trainings)
        return trainings

    return put


def test_what_befalls_a_case_does_not_stop_the_others(in_place: Callable[[Trainings], Trainings]) -> None:
    def raised(size: int) -> Exception | None:
        problems = {
            2: WorldError("no answer within 5 s"),
            4: ConfigError("parallel.pp=2 does not fit", key="parallel.pp"),
        }
        return problems.get(size)

    in_place(Trainings(raised))
    results = run_here(Suite(only=("tp", "pp", "cut")))
    assert {result.case.name: result.state for result in results} == {
        "cut": OK,
        "tp": FAILED,
        "pp": FAILED,
        "tp+cut": FAILED,
        "pp+cut": FAILED,
        "tp+pp": REFUSED,
    }
    assert {result.reason for result in results} == {"", "no answer within 5 s", "parallel.pp=2 does not fit"}


def test_without_its_reference_a_case_fails(in_place: Callable[[Trainings], Trainings]) -> None:
    trainings = in_place(Trainings(lambda size: WorldError("rank 0 ended without an answer") if size == 1 else None))
    results = run_here(Suite(only=("tp", "dp")))
    assert {result.state for result in results} == {FAILED}
    assert trainings.calls == 1 + len(results)


def test_cases_that_a_rule_forbids_are_not_trained(
    in_place: Callable[[Trainings], Trainings], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = in_place(Trainings(lambda size: None))
    monkeypatch.setattr(running, "refusal", lambda case: "tp is forbidden" if "tp" in case.keys else None)
    results = run_here(Suite(only=("tp", "cut")))
    assert {result.case.name: (result.state, result.reason) for result in results} == {
        "tp": (REFUSED, "tp is forbidden"),
        "tp+cut": (REFUSED, "tp is forbidden"),
        "cut": (OK, ""),
    }
    assert trainings.calls == 2
