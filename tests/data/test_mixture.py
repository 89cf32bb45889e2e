"""Draws from several sets of prompts: how often, in which order, and the same after a resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megarl.config.offers import Refusal
from megarl.config.sections.data import MixingConfig, PromptDataConfig
from megarl.data.mixture import BLOCK, Mixture, prompt_order
from megarl.data.prompts import Prompt
from megarl.errors import DataError
from tests.refusals import refused

SETS = [np.arange(5), np.arange(5, 12), np.arange(12, 15)]


def of_set(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted([5, 12], rows, side="right")


def test_sets_are_drawn_from_by_their_weights() -> None:
    drawn = of_set(Mixture(SETS, [6, 3, 1], 1).rows(0, 40_000))
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.6, 0.3, 0.1], atol=0.01)


def test_a_set_is_gone_through_before_any_of_its_prompts_comes_again() -> None:
    rows = Mixture(SETS, [1, 1, 1], 3).rows(0, 3 * BLOCK)
    for numbers in SETS:
        own = rows[np.isin(rows, numbers)]
        whole = own[: len(own) // len(numbers) * len(numbers)].reshape(-1, len(numbers))
        assert (np.sort(whole, axis=1) == numbers).all()
        assert len({tuple(epoch) for epoch in whole[:20]}) > 1


@pytest.mark.parametrize("begin", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 17])
def test_the_stream_is_the_same_from_any_place_on(begin: int) -> None:
    whole = Mixture(SETS, [2, 1, 1], 5, final_weights=[1, 1, 8], over=9000).rows(0, 4 * BLOCK)
    fresh = Mixture(SETS, [2, 1, 1], 5, final_weights=[1, 1, 8], over=9000)
    assert (fresh.rows(begin, BLOCK + 3) == whole[begin : begin + BLOCK + 3]).all()
    assert (fresh.rows(0, 10) == whole[:10]).all()


def test_the_seed_decides_the_draws() -> None:
    assert (Mixture(SETS, [1, 1, 1], 1).rows(0, 50) != Mixture(SETS, [1, 1, 1], 2).rows(0, 50)).any()


def test_weights_move_to_the_final_ones_and_stay_there() -> None:
    drawn = of_set(Mixture(SETS, [1, 0, 0], 1, final_weights=[0, 0, 1], over=20_000).rows(0, 40_000))
    shares = [np.bincount(part, minlength=3) / len(part) for part in np.array_split(drawn, 8)]
    np.testing.assert_allclose([share[0] for share in shares], [0.875, 0.625, 0.375, 0.125, 0, 0, 0, 0], atol=0.03)
    assert Counter(drawn.tolist()).keys() == {0, 2}


def prompts() -> list[Prompt]:
    return [Prompt(f"{number}", (1,), {}, source=number % 2) for number in range(6)]


def test_prompts_know_the_entry_that_they_come_from() -> None:
    data = PromptDataConfig(train=["a.jsonl", "b.jsonl"], mixing=MixingConfig([0.0, 1.0]))
    assert set(prompt_order(prompts(), data, 1, over=10).rows(0, 30).tolist()) == {1, 3, 5}
    assert set(prompt_order(prompts(), PromptDataConfig(), 1, over=10).rows(0, 6).tolist()) == set(range(6))


def test_an_entry_that_has_no_prompt_left_is_refused_if_it_has_a_weight() -> None:
    data = PromptDataConfig(train=["a.jsonl", "b.jsonl", "c.jsonl"], mixing=MixingConfig([1.0, 1.0, 0.5]))
    with refused(DataError, key="data.mixing.weights", value=[1.0, 1.0, 0.5], where="c.jsonl", names=("0.5",)):
        prompt_order(prompts(), data, 1, over=10)
    assert data.mixing is not None
    data.mixing.weights = [1.0, 1.0, 0.0]
    assert len(prompt_order(prompts(), data, 1, over=10).rows(0, 9)) == 9


@pytest.mark.parametrize(
    ("mixing", "key"),
    [
        (MixingConfig([1.0]), "data.mixing.weights"),
        (MixingConfig([0.0, 0.0]), "data.mixing.weights"),
        (MixingConfig([]), "data.mixing.weights"),
        (MixingConfig([1.0, 1.0], [1.0]), "data.mixing.final_weights"),
        (MixingConfig([1.0, 1.0], [0.0, 0.0]), "data.mixing.final_weights"),
        (MixingConfig([1.0, float("inf")]), "data.mixing.weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(mixing: MixingConfig, key: str) -> None:
    with pytest.raises(Refusal) as caught:
        PromptDataConfig(train=["a", "b"], mixing=mixing).check()
    assert caught.value.key == key
