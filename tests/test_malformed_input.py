"""A small part of the gate in `tests/gates/fuzz`, on every run: what is cheap to make and to read."""

from pathlib import Path

import pytest

from tests.gates.fuzz import records, scorers, surroundings
from tests.gates.fuzz.check import check

# The timeout of the test itself must not use the signal that stops a case that hangs.
pytestmark = pytest.mark.timeout(300, method="thread")


@pytest.mark.parametrize(
    ("cases", "count"),
    [(records.plain, 100), (scorers.cases, 80), (surroundings.cases, 20)],
    ids=lambda it: getattr(it, "__module__", ""),
)
def test_malformed_input_ends_in_one_line(cases: records.Maker, count: int, tmp_path: Path) -> None:
    outcome = check(cases(1, count, tmp_path), tmp_path)
    assert not outcome.faults, outcome.report()
    assert outcome.refused
