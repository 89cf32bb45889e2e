"""Tokens as they are sampled: those of the responses, in every layout; a call that is ended early."""

from typing import Any

import pytest

from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Rollout
from tests.parallel.engines import small_engine
from tests.rollout.test_generate import EOS, MODERATE, some_requests
from tests.worlds import Worlds

Name = tuple[int, int]


def streamed(layout: dict[str, Any], end_after: int | None = None) -> tuple[list[Rollout], dict[Name, list[int]], int]:
    """Return the responses, the tokens that this rank was called with by response, and the number of calls."""
    generator = Generator(small_engine(layout, MODERATE, train=False), EOS, seed=5, limits=Limits(7))
    tokens: dict[Name, list[int]] = {}
    calls = 0

    def on_tokens(sampled: list[tuple[Request, int]]) -> bool:
        nonlocal calls
        calls += 1
        for request, token in sampled:
            tokens.setdefault((request.prompt_id, request.sample_id), []).append(token)
        return end_after is not None and calls >= end_after

    rollouts = generator.generate(some_requests(), on_tokens=on_tokens)
    if end_after is None:
        unwatched = generator.generate(some_requests())
        assert [rollout.response for rollout in rollouts] == [rollout.response for rollout in unwatched]
    return rollouts, tokens, calls


def by_name(rollouts: list[Rollout]) -> dict[Name, list[int]]:
    return {(rollout.prompt_id, rollout.sample_id): rollout.response for rollout in rollouts}


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {"tp": 2}), (2, {"pp": 2})])
def test_the_tokens_are_those_of_the_responses(size: int, layout: dict[str, Any], worlds: Worlds) -> None:
    for rollouts, tokens, _ in worlds.run(size, streamed, layout):
        assert tokens == by_name(rollouts)


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {"pp": 2})])
def test_a_call_that_is_ended_early_ends_with_the_next_tokens(
    size: int, layout: dict[str, Any], worlds: Worlds
) -> None:
    whole = by_name(worlds.run(size, streamed, layout)[0][0])
    for rollouts, tokens, calls in worlds.run(size, streamed, layout, end_after=4):
        assert calls <= 4 + size
        found = by_name(rollouts)
        assert found == tokens
        assert 0 < len(found) < len(whole)  # no other response was started
        assert all(response == whole[name][: len(response)] for name, response in found.items())
