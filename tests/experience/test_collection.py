"""Which prompts a phase uses, and which responses it trains on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megarl.data.prompts import Prompt
from megarl.experience.collection import Collected, Scored, collect, with_spread
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores, total
from megarl.rollout.requests import Rollout

Table = dict[int, list[Score | None]]


def rollout(prompt: int, sample: int, reason: str = "eos") -> Rollout:
    return Rollout(prompt, sample, [prompt + 1], [2], [-1.0], reason)


class PromptsWithScores:
    """Prompts 0, 1, 2, ... whose responses have the scores of a table; others have 0 and 1."""

    def __init__(self, table: Table, greedy: dict[int, float | None] | None = None) -> None:
        self.table, self.greedy = table, greedy
        self.calls: list[tuple[int, int]] = []

    def next_prompts(self, first: int, count: int) -> list[Prompt]:
        self.calls.append((first, count))
        return [Prompt(f"{number}", (number + 1,), {}) for number in range(first, first + count)]

    def respond(self, prompts: Sequence[Prompt], first: int) -> Scored:
        numbers = range(first, len(prompts))
        answers = [(one, scores) for one in numbers for scores in [self.table.get(one, [0.0, 1.0])]]
        rollouts = [rollout(one, sample) for one, scores in answers for sample in range(len(scores))]
        values = [score for _, scores in answers for score in scores]
        double = [None if score is None else 2 * total(score) for score in values]
        scores = Scores(values, {"double": double})
        if self.greedy is None:
            return Scored(rollouts, scores)
        greedy = [rollout(one, 9, "length" if one % 2 else "eos") for one in numbers]
        return Scored(rollouts, scores, greedy, [self.greedy.get(one, 0.5) for one in numbers])

    def collect(self, wanted: int, most: int | None = None, clip: float | None = None) -> Collected:
        return collect(self.next_prompts, self.respond, wanted, most=most, clip_scores=clip)


def ids(found: Collected) -> list[tuple[int, int]]:
    return [(one.prompt_id, one.sample_id) for one in found.rollouts]


def test_a_phase_has_its_prompts_and_all_responses_with_a_score() -> None:
    prompts = PromptsWithScores({0: [1.0, 1.0], 1: [None, 2.0]})
    found = prompts.collect(3)
    assert prompts.calls == [(0, 3)]
    assert ids(found) == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    assert found.scores == [1.0, 1.0, 2.0, 0.0, 1.0]
    assert (len(found.prompts), found.unscored, found.replaced) == (3, 1, 0)


def test_prompts_without_spread_are_replaced_by_exactly_as_many_as_are_missing() -> None:
    prompts = PromptsWithScores({0: [1.0, 1.0], 2: [0.0, 0.0], 5: [3.0, 3.0]})
    found = prompts.collect(4, most=100)
    assert prompts.calls == [(0, 4), (4, 2), (6, 1)]
    assert [one for one, _ in ids(found)] == [1, 1, 3, 3, 4, 4, 6, 6]
    assert (len(found.prompts), found.replaced, found.unscored) == (7, 3, 0)
    assert len(found.all_scores.values) == 14


def test_replacing_ends_at_its_limit_with_what_it_has() -> None:
    prompts = PromptsWithScores({number: [1.0, 1.0] for number in range(1, 50)})
    found = prompts.collect(4, most=10)
    assert prompts.calls == [(0, 4), (4, 3), (7, 3)]
    assert [one for one, _ in ids(found)] == [0, 0]
    assert (len(found.prompts), found.replaced) == (10, 9)


def test_a_phase_may_have_nothing_at_all() -> None:
    found = PromptsWithScores({number: [1.0, 1.0] for number in range(8)}).collect(2, most=8)
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
        ([[0.1, 0.1, 0.1], [0.3]], None, False),  # different in float64
        ([None, 2.0], None, False),
        ([None, 2.0, 1.0], None, True),
        ([2.0], None, False),
        ([None, None], None, False),
    ],
)
def test_spread_is_of_clipped_scores_of_at_least_two_responses(
    scores: list[Score | None], clip: float | None, differ: bool
) -> None:
    scored = PromptsWithScores({3: scores}).respond([Prompt("", (1,), {})] * 4, 3)
    assert with_spread(scored, clip) == ({3} if differ else set())


def test_responses_are_compared_with_the_greedy_one_to_their_prompt() -> None:
    found = PromptsWithScores({}, greedy={0: 0.25, 2: None}).collect(3)
    assert [one for one, _ in ids(found)] == [0, 0, 1, 1]  # the greedy response to prompt 2 has no score
    assert found.greedy is not None
    assert found.greedy.scores == [0.25, 0.25, 0.5, 0.5]
    assert found.greedy.truncated == [False, False, True, True]
    assert found.unscored == 2


def test_components_are_of_the_responses_that_train() -> None:
    found = PromptsWithScores({0: [1.0, 1.0], 1: [None, 2.0, 3.0]}).collect(1, most=2)
    assert ids(found) == [(1, 1), (1, 2)]
    assert found.trained_scores.means() == {"double": 5.0}
    assert found.all_scores.means() == {"double": 3.5}
