"""Draws from several sets of prompts: how often, in which order, and the same after a resume."""

from __future__ import annotations

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


def phases_of(mixture: Mixture, *counts: int) -> list[np.ndarray]:
    """The prompts of phases that use so many prompts each."""
    found, begin = [], 0
    for phase, count in enumerate(counts):
        found.append(mixture.rows(begin, count, phase))
        begin += count
        mixture.end_phase(begin, phase)
    return found


def test_sets_are_used_by_their_weights() -> None:
    used = of_set(Mixture(SETS, [6, 3, 1], 1).rows(0, 40_000, 0))
    np.testing.assert_allclose(np.bincount(used) / len(used), [0.6, 0.3, 0.1], atol=0.01)


def test_every_prompt_of_a_set_is_used_before_any_is_repeated() -> None:
    rows = np.concatenate(phases_of(Mixture(SETS, [1, 1, 1], 3), *[700] * 20))
    for indices in SETS:
        own = rows[np.isin(rows, indices)]
        whole = own[: len(own) // len(indices) * len(indices)].reshape(-1, len(indices))
        assert (np.sort(whole, axis=1) == indices).all()
        assert len({tuple(epoch) for epoch in whole[:20]}) > 1


def test_a_phase_may_be_read_in_pieces_and_again() -> None:
    mixture, other = (Mixture(SETS, [2, 1, 1], 5, final_weights=[1, 1, 8], over=4) for _ in range(2))
    sizes = (BLOCK - 3, 7, 2 * BLOCK, 50)
    begin = 0
    for phase, (size, whole) in enumerate(zip(sizes, phases_of(other, *sizes), strict=True)):
        for first, count in ((0, 2), (2, size - 2), (1, size - 1)):
            assert (mixture.rows(begin + first, count, phase) == whole[first : first + count]).all()
        begin += size
        mixture.end_phase(begin, phase)


def test_a_resume_continues_where_the_checkpoint_was() -> None:
    sizes = (300, 250, 400)
    whole = phases_of(Mixture(SETS, [2, 1, 1], 5, final_weights=[1, 1, 8], over=3), *sizes)
    before, after = (Mixture(SETS, [2, 1, 1], 5, final_weights=[1, 1, 8], over=3) for _ in range(2))
    phases_of(before, *sizes[:2])
    after.load_state_dict(before.state_dict(), 550)
    assert (after.rows(550, 400, 2) == whole[2]).all()


def test_a_resume_with_other_weights_repeats_no_prompt_before_its_time() -> None:
    first, second = Mixture([np.arange(100)] * 2, [1, 1], 5), Mixture([np.arange(100)] * 2, [1, 0], 5)
    (used,) = phases_of(first, 120)
    second.load_state_dict(first.state_dict(), 120)
    count = first.state_dict()["used_of_set"][0]
    only = Mixture([np.arange(100)] * 2, [1, 0], 5)
    whole = only.rows(0, 100, 0)  # the order of the first set
    assert (second.rows(120, 100 - count, 1) == whole[count:]).all()
    assert len(used) == sum(first.state_dict()["used_of_set"])
    other_number = Mixture(SETS, [1, 1, 1], 5)
    other_number.load_state_dict(first.state_dict(), 120)
    assert other_number.state_dict() == {"used_of_set": [0, 0, 0]}


def test_the_seed_decides_the_prompts() -> None:
    assert (Mixture(SETS, [1, 1, 1], 1).rows(0, 50, 0) != Mixture(SETS, [1, 1, 1], 2).rows(0, 50, 0)).any()


def test_weights_move_to_the_final_ones_and_stay_there() -> None:
    phases = phases_of(Mixture(SETS, [1, 0, 0], 1, final_weights=[0, 0, 1], over=4), *[5000, 5000, 9000, 5000, 50, 50])
    shares = [np.bincount(of_set(rows), minlength=3) / len(rows) for rows in phases]
    np.testing.assert_allclose([share[0] for share in shares], [1, 0.75, 0.5, 0.25, 0, 0], atol=0.03)
    assert all(share[1] == 0 for share in shares)


def prompts() -> list[Prompt]:
    return [Prompt(f"{number}", (1,), {}, source=number % 2) for number in range(6)]


def test_prompts_know_the_entry_that_they_come_from() -> None:
    data = PromptDataConfig(train=["a.jsonl", "b.jsonl"], mixing=MixingConfig([0.0, 1.0]))
    assert set(prompt_order(prompts(), data, 1, 10).rows(0, 30, 0).tolist()) == {1, 3, 5}
    assert set(prompt_order(prompts(), PromptDataConfig(), 1, 10).rows(0, 6, 0).tolist()) == set(range(6))


def test_an_entry_that_has_no_prompt_left_is_refused_if_it_has_a_weight() -> None:
    data = PromptDataConfig(train=["a.jsonl", "b.jsonl", "c.jsonl"], mixing=MixingConfig([1.0, 1.0, 0.5]))
    with refused(DataError, key="data.mixing.weights", value=[1.0, 1.0, 0.5], where="c.jsonl", names=("0.5",)):
        prompt_order(prompts(), data, 1, 10)
    assert data.mixing is not None
    data.mixing.weights = [1.0, 1.0, 0.0]
    assert len(prompt_order(prompts(), data, 1, 10).rows(0, 9, 0)) == 9


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
