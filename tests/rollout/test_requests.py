"""Bad requests end in one line that names the key, the value and what to do."""

from typing import Any

import pytest

from megarl.errors import ConfigError
from megarl.rollout.requests import Request, Sampling, check_requests, repeat
from tests.refusals import refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("allowed", ()),
        ("temperature", pytest.approx(float("nan"), nan_ok=True)),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_refused(name: str, value: Any) -> None:
    given = getattr(value, "expected", value)
    with refused(ConfigError, key=f"rollout.{name}", value=value, names=(f"rollout.{name}={given}",)):
        Sampling(**{name: given})


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"stop": ((1,), ())}, "rollout.stop", [(1,), ()]),
        ({"stop_text": ("",)}, "rollout.stop", [""]),
        ({"allowed": (1, 2), "forbidden": (2, 1, 3)}, "rollout.forbidden", [2, 1, 3]),
    ],
)
def test_stops_and_tokens_that_leave_nothing_to_draw_are_refused(
    settings: dict[str, Any], key: str, value: Any
) -> None:
    with refused(ConfigError, key=key, value=value):
        Sampling(**settings)


def test_an_empty_prompt_and_no_samples_are_refused() -> None:
    with refused(ConfigError, key="prompt", value=(), where="prompt 3"):
        Request(3, 0, ())
    with refused(ConfigError, key="rollout.n", value=0, names=("rollout.n=0",)):
        repeat([[1]], 0, Sampling())


def test_samples_of_a_prompt_are_numbered() -> None:
    named = [(r.prompt_id, r.sample_id, r.prompt) for r in repeat([[1, 2], [3]], 2, Sampling())]
    assert named == [(0, 0, (1, 2)), (0, 1, (1, 2)), (1, 0, (3,)), (1, 1, (3,))]


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([Request(0, 0, (1,)), Request(0, 0, (2,))], {"key": "prompt_id", "names": ("sample_id",)}),
        (
            [Request(2, 0, (1,) * 10, Sampling(max_new_tokens=60))],
            {"key": "rollout.max_new_tokens", "value": 60, "where": "prompt 2", "names": ("64",)},
        ),
        (
            [Request(4, 0, (1, 100, 3), Sampling(max_new_tokens=1))],
            {"key": "token", "value": 100, "where": "prompt 4"},
        ),
        (
            [Request(0, 0, (1,), Sampling(max_new_tokens=1, allowed=(100, 200)))],
            {"key": "rollout.allowed", "value": (100, 200), "names": ("rollout.forbidden",)},
        ),
        (
            [Request(0, 0, (1,), Sampling(max_new_tokens=1, forbidden=tuple(range(100))))],
            {"key": "rollout.allowed", "value": None, "names": ("rollout.forbidden", "100")},
        ),
        (
            [Request(0, 0, (1,), Sampling(max_new_tokens=1, stop_text=("x",)))],
            {"key": "decode", "names": ("decode=tokenizer.decode",)},
        ),
    ],
)
def test_requests_that_do_not_suit_the_model_are_refused(requests: list[Request], expected: dict[str, Any]) -> None:
    with refused(ConfigError, **expected):
        check_requests(requests, 100, 64, can_decode=False)
