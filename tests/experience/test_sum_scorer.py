"""Scores of several sources become one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megarl.config.offers import Refusal
from megarl.config.sections.reward import RewardConfig
from megarl.experience.sum_scorer import SumScorer
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores


class Stored:
    """A scorer that gives the scores that it was made with."""

    def __init__(self, name: str, values: Sequence[Score | None]) -> None:
        self.name = self.fingerprint = name
        self.values, self.closed, self.forgotten = list(values), False, 0

    def score(self, prompts: object, rollouts: object, *, stream: int, phase: int) -> Scores:
        return Scores(self.values, {f"{self.name}_part": [1.0] * len(self.values)}, failed_calls=1, reencoded=2)

    def forget(self, before: int) -> None:
        self.forgotten = before

    def close(self) -> None:
        self.closed = True


def test_a_sum_has_weights_keeps_the_parts_and_lacks_what_any_source_lacks() -> None:
    model, fn = Stored("model", [1.0, 2.0, 3.0]), Stored("fn", [10.0, [1.0, 2.0], None])
    both = SumScorer({"model": model, "fn": fn}, {"model": 2, "fn": 0.5})
    found = both.score([], [], stream=0, phase=0)
    assert found.values == [7.0, [0.5, 5.0], None]
    assert found.parts["model"] == [1.0, 2.0, 3.0]
    assert found.parts["fn"] == [10.0, 3.0, None]
    assert "model_part" in found.parts
    assert (found.failed_calls, found.reencoded) == (2, 4)
    both.forget(3)
    both.close()
    assert (model.forgotten, fn.forgotten, model.closed, fn.closed) == (3, 3, True, True)
    assert both.fingerprint != SumScorer({"model": model, "fn": fn}, {"model": 2, "fn": 1}).fingerprint


def test_weights_are_wanted_for_several_sources_and_for_nothing_else() -> None:
    RewardConfig(fn="a:b", model="x", terms={"fn": 1.0, "model": 0.1}).check()
    with pytest.raises(Refusal) as caught:
        RewardConfig(fn="a:b", model="x").check()
    assert "reward.terms={fn: 1, model: 1}" in str(caught.value.otherwise)
    for settings in ({"fn": "a:b", "terms": {"model": 1.0}}, {"fn": "a:b", "terms": {"fn": 1.0, "url": 1.0}}):
        with pytest.raises(Refusal) as caught:
            RewardConfig(**settings).check()  # type: ignore[arg-type]
        assert caught.value.key == "reward.terms"
