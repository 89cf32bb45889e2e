"""Which cases are refused: the reasons are those of the configuration's, the layout's and the engine's rules."""

from typing import Any

import pytest

from megarl.conformance.features import Case
from megarl.conformance.rules import refusal, refuse
from tests.refusals import refused


@pytest.mark.parametrize(
    ("keys", "changed", "world", "key"),
    [
        (("tp",), {"parallel.tp": 3}, 3, "parallel.tp"),  # a rule of the model's shape
        (("vpp",), {"parallel.vpp": 3}, 2, "parallel.vpp"),
        (("tp",), {}, 3, "parallel.tp"),  # a rule of the number of processes
        (("ep",), {}, 1, "parallel.ep"),  # a rule of the layout
        (("ep", "adapter"), {"adapter.base_bits": 4}, 2, "adapter.base_bits"),  # a rule of the engine
        (("adapter",), {"model.num_layers_unfrozen": 0}, 1, "model.num_layers_unfrozen"),
    ],
)
def test_a_rule_that_forbids_a_case_is_what_is_shown(
    keys: tuple[str, ...], changed: dict[str, Any], world: int, key: str
) -> None:
    with refused(key=key):
        refuse({**Case(keys).settings, **changed}, world)


def test_a_case_that_rules_allow_is_not_refused() -> None:
    for keys in (("tp", "pp"), ("sp", "ep"), ("vpp", "cut"), ("freeze", "adapter"), ("dp", "ep")):
        assert refusal(Case(keys)) is None


def test_in_a_given_world_a_case_needs_a_divisor_of_the_processes() -> None:
    assert refusal(Case(("tp",)), 4) is None
    assert refusal(Case(("dp", "ep")), 8) is None
    for case, world in ((Case(("dp",)), 1), (Case(("dp", "ep")), 2), (Case(("tp", "pp")), 2)):
        reason = refusal(case, world)
        assert reason is not None
        assert str(world) in reason
