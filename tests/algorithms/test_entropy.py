"""The weight of the entropy bonus rises below its target and falls above it."""

import pytest

from megarl.algorithms import AdaptiveEntropy, FixedEntropy
from megarl.errors import ConfigError
from tests.refusals import refused


def test_the_weight_rises_below_the_target_and_does_not_count_above_it() -> None:
    control = AdaptiveEntropy(0.01, target=1.0, step=0.005, maximum=0.018)
    seen = []
    for entropy in (0.9, 1.0, 0.5, 1.1, 1.2, 0.9):
        control.begin(entropy)
        seen.append(round(control.value, 6))
    assert seen == [0.01, 0.015, 0.018, 0.0, 0.0, 0.008]


def test_the_weight_is_never_negative() -> None:
    control = AdaptiveEntropy(0.0, target=1.0, step=0.1, maximum=1.0)
    control.begin(2.0)
    control.begin(0.5)
    assert control.value == 0.0
    control.begin(0.5)
    assert control.value == pytest.approx(0.1)


def test_a_fixed_weight_stays() -> None:
    control = FixedEntropy(0.3)
    control.begin(0.0)
    control.load_state_dict(AdaptiveEntropy(0.1, 1.0, 0.1, 1.0).state_dict())
    assert (control.value, control.state_dict()) == (0.3, {})


@pytest.mark.parametrize("key", ["target", "step", "maximum"])
def test_wrong_settings_are_refused(key: str) -> None:
    settings = {"target": 1.0, "step": 0.1, "maximum": 1.0, key: 0.0}
    with refused(ConfigError, key=key, value=0.0):
        AdaptiveEntropy(0.1, **settings)
