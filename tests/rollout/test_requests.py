"""Bad requests end in one line that names the key, the value and what to do."""

from typing import Any

import pytest

from megarl.errors import ConfigError
from megarl.rollout.requests import Request, Sampling, check_requests, repeat


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "rollout.temperature=-0.1"),
        ({"top_k": 0}, "rollout.top_k=0"),
        ({"top_p": 0.0}, "rollout.top_p=0.0"),
        ({"top_p": 1.5}, "rollout.top_p=1.5"),
        ({"min_p": 1.0}, "rollout.min_p=1.0"),
        ({"repetition_penalty": 0.0}, "rollout.repetition_penalty=0.0"),
        ({"max_new_tokens": 0}, "rollout.max_new_tokens=0"),
        ({"stop": ((1,), ())}, "rollout.stop holds a sequence of no tokens"),
        ({"stop_text": ("",)}, "rollout.stop holds an empty text"),
        ({"allowed": ()}, "rollout.allowed=()"),
        ({"allowed": (1, 2), "forbidden": (2, 1, 3)}, "leaves none of the allowed tokens"),
        ({"temperature": float("nan")}, "rollout.temperature=nan"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as problem:
        Sampling(**settings)
    assert said in str(problem.value)
    assert "\n" not in str(problem.value)


def test_an_empty_prompt_and_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt 3 has no tokens"):
        Request(3, 0, ())
    with pytest.raises(ConfigError, match=r"rollout\.n=0 asks for no responses"):
        repeat([[1]], 0, Sampling())


def test_samples_of_a_prompt_are_numbered() -> None:
    named = [(r.prompt_id, r.sample_id, r.prompt) for r in repeat([[1, 2], [3]], 2, Sampling())]
    assert named == [(0, 0, (1, 2)), (0, 1, (1, 2)), (1, 0, (3,)), (1, 1, (3,))]


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([Request(0, 0, (1,)), Request(0, 0, (2,))], "number them apart"),
        ([Request(0, 0, (1,) * 10, Sampling(max_new_tokens=60))], "the model's context is 64"),
        ([Request(4, 0, (1, 100, 3), Sampling(max_new_tokens=1))], "prompt 4 holds token 100"),
        ([Request(0, 0, (1,), Sampling(max_new_tokens=1, allowed=(100, 200)))], "none of the model's 100 tokens"),
        ([Request(0, 0, (1,), Sampling(max_new_tokens=1, forbidden=tuple(range(100))))], "none of the model's 100"),
        ([Request(0, 0, (1,), Sampling(max_new_tokens=1, stop_text=("x",)))], "decode=tokenizer.decode"),
    ],
)
def test_requests_that_do_not_suit_the_model_are_refused(requests: list[Request], said: str) -> None:
    with pytest.raises(ConfigError) as problem:
        check_requests(requests, 100, 64, can_decode=False)
    assert said in str(problem.value)
