"""Which prompts a phase uses, and which responses it trains on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megarl.data.prompts import Prompt
from megarl.experience.collection import Collected, Scored, collect, with_spread
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout

Table = dict[int, list[Score | None]]


def rollout(prompt: int, sample: int, reason: str = "eos") -> Rollout:
    return Rollout(prompt, sample, [prompt + 1], [2], [-1.0], reason)


class World:
    """Prompts 0, 1, 2, ... whose responses have the scores of a table; others have 0 and 1."""

    def __init__(self, table: Table, greedy: dict[int, float | None] | None = None) -> None:
        self.table, self.greedy = table, greedy
        self.asked: list[tuple[int, int]] = []

    def draw(self, first: int, count: int) -> list[Prompt]:
        self.asked.append((first, count))
        return [Prompt(f"{number}", (number + 1,), {}) for number in range(first, first + count)]

    def respond(self, prompts: Sequence[Prompt], first: int) -> Scored:
        numbers = range(first, len(prompts))
        answers = [(one, scores) for one in numbers for scores in [self.table.get(one, [0.0, 1.0])]]
        rollouts = [rollout(one, sample) for one, scores in answers for sample in range(len(scores))]
        scores = Scores([score for _, scores in answers for score in scores])
        if self.greedy is None:
            return Scored(rollouts, scores)
        greedy = [rollout(one, 9, "length" if one % 2 else "eos") for one in numbers]
        return Scored(rollouts, scores, greedy, [self.greedy.get(one, 0.5) for one in numbers])

    def collect(self, wanted: int, most: int | None = None, clip: float | None = None) -> Collected:
        return collect(self.draw, self.respond, wanted, most=most, clip_scores=clip)


def ids(found: Collected) -> list[tuple[int, int]]:
    return [(one.prompt_id, one.sample_id) for one in found.rollouts]


def test_a_phase_has_its_prompts_and_all_responses_with_a_score() -> None:
    world = World({0: [1.0, 1.0], 1: [None, 2.0]})
    found = world.collect(3)
    assert world.asked == [(0, 3)]
    assert ids(found) == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    assert found.scores == [1.0, 1.0, 2.0, 0.0, 1.0]
    assert (len(found.prompts), found.unscored, found.replaced) == (3, 1, 0)


def test_prompts_without_spread_are_replaced_by_exactly_as_many_as_are_missing() -> None:
    world = World({0: [1.0, 1.0], 2: [0.0, 0.0], 5: [3.0, 3.0]})
    found = world.collect(4, most=100)
    assert world.asked == [(0, 4), (4, 2), (6, 1)]
    assert [one for one, _ in ids(found)] == [1, 1, 3, 3, 4, 4, 6, 6]
    assert (len(found.prompts), found.replaced, found.unscored) == (7, 3, 0)
    assert len(found.all_scores.values) == 14


def test_replacing_ends_at_its_limit_with_what_it_has() -> None:
    world = World({number: [1.0, 1.0] for number in range(1, 50)})
    found = world.collect(4, most=10)
    assert world.asked == [(0, 4), (4, 3), (7, 3)]
    assert [one for one, _ in ids(found)] == [0, 0]
    assert (len(found.prompts), found.replaced) == (10, 9)


def test_a_phase_may_have_nothing_at_all() -> None:
    found = World({number: [1.0, 1.0] for number in range(8)}).collect(2, most=8)
    assert (found.rollouts, len(found.prompts), found.unscored) == ([], 8, 0)


@pytest.mark.parametrize(
    ("scores", "clip", "differ"),
    [
        ([1.0, 2.0], None, True),
        ([1.0, 1.0], None, False),
        ([5.0, 7.0], 1.0, False),
        ([-5.0, 7.0], 1.0, True),
        ([[1.0, 2.0], [3.0]], None, False),
        ([[1.0, 2.0], [3.0]], 1.0, True),
        ([None, 2.0], None, False),
        ([None, 2.0, 1.0], None, True),
        ([2.0], None, False),
        ([None, None], None, False),
    ],
)
def test_spread_is_of_clipped_scores_of_at_least_two_responses(
    scores: list[Score | None], clip: float | None, differ: bool
) -> None:
    scored = World({3: scores}).respond([Prompt("", (1,), {})] * 4, 3)
    assert with_spread(scored, clip) == ({3} if differ else set())


def test_greedy_responses_go_with_their_prompts_when_these_are_replaced() -> None:
    world = World({0: [1.0, 1.0]}, greedy={2: None})
    found = world.collect(3, most=9)
    assert [one for one, _ in ids(found)] == [1, 1, 3, 3]  # the greedy response to prompt 2 has no score
    assert found.greedy is not None
    assert (found.greedy.scores, found.greedy.truncated) == ([0.5] * 4, [True] * 4)
    assert found.unscored == 2
