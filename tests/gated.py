"""Parameters of a test of which `make test` runs some, and `make gates` the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def gated(cases: Iterable[Any], later: Collection[Any]) -> list[Any]:
    """All cases as parameters, a tuple as several; those in `later` are long checks of the gates."""
    cases = list(cases)
    assert [case for case in later if case not in cases] == [], "a case of the gates that does not exist"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.gate] * (case in later))
        for case in cases
    ]
