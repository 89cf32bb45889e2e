"""What a phase is trained on, worked out by hand from its scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.ppo import PPOSettings
from megarl.config.ppo_sections import AdaptiveEntropyConfig, AdaptiveKLConfig, CorrectionConfig, OverlongConfig
from megarl.experience.shaping import Shaping, explained_variance, whitening_factor
from megarl.parallel.rows import Rows
from megarl.rewards.answers import Score

JUNK = 100.0


def shaping(**settings: Any) -> Shaping:
    """Undiscounted rewards to go, and nothing else unless asked for."""
    plain: dict[str, Any] = {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0, "whiten_advantages": False}
    return Shaping(PPOSettings(**{**plain, **settings}), max_new_tokens=4)


def phase(gap: float | None = None, value: float = 0.0, truncated: tuple[bool, bool] = (False, False)) -> Rows:
    """A prompt token and three actions; a prompt token, two actions and padding. Junk where there is no action."""
    mask = torch.tensor([[0.0, 1, 1, 1], [0, 1, 1, 0]])

    def column(number: float) -> Tensor:
        return torch.where(mask == 0, JUNK, number)

    rows = Rows(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 3]), mask)
    rows = rows.with_columns(
        values=column(value),
        old_logprobs=column(-1.0),
        truncated=torch.tensor(truncated),
        group=torch.tensor([0, 1]),
    )
    return rows if gap is None else rows.with_columns(ref_logprobs=column(-1.0 - gap))


def shaped(
    shaping: Shaping, scores: list[Score], truncated: tuple[bool, bool] = (False, False), **made: Any
) -> tuple[Tensor, Tensor]:
    """advantages and returns of a phase."""
    rows, _ = shaping.shape(phase(truncated=truncated, **made), scores)
    return rows["advantages"], rows["returns"]


def test_a_score_lands_on_the_last_action_of_its_row() -> None:
    """gamma = 1/2: what lands on the third action is worth a half on the second and a quarter on the first."""
    advantages, _ = shaped(shaping(gamma=0.5), [8.0, 4.0])
    assert advantages.tolist() == [[0, 2, 4, 8], [0, 2, 4, 0]]


def test_rewards_of_tokens_stay_where_they_were_given() -> None:
    advantages, _ = shaped(shaping(), [[1.0, 2.0, 3.0], [4.0, 5.0]])
    assert advantages.tolist() == [[0, 6, 5, 3], [0, 9, 5, 0]]


def test_plain_scores_and_rewards_of_tokens_may_stand_side_by_side() -> None:
    advantages, _ = shaped(shaping(), [7.0, [4.0, 5.0]])
    assert advantages.tolist() == [[0, 7, 7, 7], [0, 9, 5, 0]]


def test_the_kl_is_taken_from_every_tokens_reward() -> None:
    advantages, _ = shaped(shaping(kl_coef=0.1), [1.0, 2.0], gap=0.5)
    wanted = torch.tensor([[0, 0.85, 0.90, 0.95], [0, 1.90, 1.95, 0]])
    torch.testing.assert_close(advantages, wanted)


def test_a_kl_that_is_a_loss_is_not_taken_from_the_reward() -> None:
    advantages, _ = shaped(shaping(kl_coef=0.1, kl_in="loss"), [1.0, 2.0], gap=0.5)
    assert advantages.tolist() == [[0, 1, 1, 1], [0, 2, 2, 0]]


def test_the_kl_that_is_logged_is_the_mean_of_the_rows_sums() -> None:
    _, stats = shaping(kl_coef=0.1).shape(phase(gap=0.5), [1.0, 2.0])
    assert stats["rollout/kl"] == pytest.approx((3 * 0.5 + 2 * 0.5) / 2)
    assert stats["rollout/kl_coef"] == pytest.approx(0.1)
    assert stats["rollout/score"] == 1.5
    assert stats["rollout/score_std"] == pytest.approx(math.sqrt(0.5))


def last_rewards(shaping: Shaping, scores: list[float]) -> list[float]:
    advantages, _ = shaped(shaping, list(scores))
    return [float(advantages[0, 3]), float(advantages[1, 2])]


def test_scores_are_clipped_before_they_are_scaled() -> None:
    """10 and 1, cut to 2 and 1, have a deviation of sqrt(1/2). Scaled first, they would be 1.57 and 0.16."""
    wanted = [2 / math.sqrt(0.5), 1 / math.sqrt(0.5)]
    assert last_rewards(shaping(clip_scores=2.0, scale_scores="running"), [10.0, 1.0]) == pytest.approx(wanted)


def test_clipping_works_on_both_sides() -> None:
    assert last_rewards(shaping(clip_scores=2.0), [-10.0, 10.0]) == [-2.0, 2.0]


@pytest.mark.parametrize(
    ("how", "second"),
    [
        ("ignored", 1.0),
        # All four, 2 1 2 0, have mean 5/4 and squared deviations 11/4, over 3; the mean is never taken off.
        ("running", 1 / math.sqrt(11 / 12)),
        ("ref", 1 / math.sqrt(0.5)),
    ],
)
def test_later_phases_are_scaled_by_what_was_asked_for(how: str, second: float) -> None:
    it = shaping(scale_scores=how)
    last_rewards(it, [2.0, 1.0])
    assert last_rewards(it, [2.0, 0.0]) == pytest.approx([2 * second, 0.0])


@pytest.mark.parametrize("how", ["ignored", "running", "ref"])
def test_equal_scores_have_no_advantage_and_no_nan(how: str) -> None:
    it = shaping(scale_scores=how, whiten_advantages=True)
    advantages, returns = shaped(it, [3.0, 3.0])
    assert advantages.tolist() == [[0.0] * 4] * 2
    assert bool(torch.isfinite(returns).all())
    whitened, _ = shaped(shaping(scale_scores=how, whiten_advantages=True, whiten_rewards=True), [3.0, 3.0])
    assert bool(torch.isfinite(whitened).all())


def test_advantages_are_whitened_over_actions_alone() -> None:
    """Rewards to go 6 5 3 and 9 5: mean 5.6, squared deviations 19.2 over 4. Junk elsewhere changes nothing."""
    advantages, returns = shaped(shaping(whiten_advantages=True), [[1.0, 2.0, 3.0], [4.0, 5.0]])
    raw = torch.tensor([[5.6, 6, 5, 3], [5.6, 9, 5, 5.6]])
    torch.testing.assert_close(advantages, (raw - 5.6) / math.sqrt(4.8))
    assert returns.tolist() == [[0, 6, 5, 3], [0, 9, 5, 0]]


def test_whitened_rewards_keep_their_mean() -> None:
    """Rewards 1 2 3 and 4 5 have mean 3 and variance 5/2; each is moved towards no mean, only scaled about it."""
    it = shaping(whiten_rewards=True, gamma=0.0)
    advantages, _ = shaped(it, [[1.0, 2.0, 3.0], [4.0, 5.0]])
    raw = torch.tensor([[0.0, 1, 2, 3], [0, 4, 5, 0]])
    wanted = torch.where(phase().action_mask != 0, (raw - 3) / math.sqrt(2.5) + 3, torch.zeros(()))
    torch.testing.assert_close(advantages, wanted)


def test_returns_are_advantages_plus_values() -> None:
    advantages, returns = shaped(shaping(lam=0.0), [1.0, 2.0], value=0.25)
    torch.testing.assert_close(advantages, torch.tensor([[0, 0, 0, 0.75], [0, 0, 1.75, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0, 0.25, 0.25, 1], [0, 0.25, 2, 0]]))


def test_a_missing_end_costs_its_penalty_at_the_last_action() -> None:
    advantages, _ = shaped(
        shaping(overlong=OverlongConfig(missing_eos_penalty=0.5), gamma=0.0), [1.0, 2.0], truncated=(True, False)
    )
    assert advantages.tolist() == [[0, 0, 0, 0.5], [0, 0, 2, 0]]


def test_a_long_response_costs_more_the_closer_it_is_to_the_limit() -> None:
    """Of four tokens, the last two are the buffer: three tokens cost half of the penalty, two cost nothing."""
    advantages, _ = shaped(shaping(overlong=OverlongConfig(penalty=0.5, buffer=0.5), gamma=0.0), [1.0, 2.0])
    assert advantages.tolist() == [[0, 0, 0, 0.75], [0, 0, 2, 0]]


def test_correction_adds_the_column_weights() -> None:
    rows = phase().with_columns(rollout_logprobs=torch.tensor([[JUNK, -2.0, -1.0, -9.0], [JUNK, -1.0, -0.5, JUNK]]))
    shaped_rows, stats = shaping(correction=CorrectionConfig(high=2.0)).shape(rows, [1.0, 2.0])
    torch.testing.assert_close(shaped_rows["weights"], torch.tensor([[0, 2, 1, 2], [0, 1, math.exp(-0.5), 0]]))
    assert stats["correction/limited"] == pytest.approx(2 / 5)
    assert "weights" not in shaping().shape(rows, [1.0, 2.0])[0]


def test_a_resume_restores_the_entropy_coefficient() -> None:
    first = shaping(entropy_coef=0.01, adaptive_entropy=AdaptiveEntropyConfig(1.0, 0.02))
    first.entropy_control.begin(0.5)
    assert first.entropy_control.value == 0.01
    again = shaping(entropy_coef=0.01, adaptive_entropy=AdaptiveEntropyConfig(1.0, 0.02))
    again.load_state_dict(first.state_dict())
    again.entropy_control.begin(0.5)
    assert again.entropy_control.value == pytest.approx(0.03)
    older = {name: state for name, state in first.state_dict().items() if not name.startswith("entropy")}
    again.load_state_dict(older)


def test_the_weight_of_the_entropy_starts_again_with_another_target_or_start() -> None:
    first = shaping(entropy_coef=0.01, adaptive_entropy=AdaptiveEntropyConfig(1.0, 0.02))
    first.steer_entropy(0.5)
    for coef, target in ((0.02, 1.0), (0.01, 2.0)):
        again = shaping(entropy_coef=coef, adaptive_entropy=AdaptiveEntropyConfig(target, 0.02))
        again.load_state_dict(first.state_dict())
        assert again.steer_entropy(0.5) == {"rollout/entropy_coef": coef}
    assert shaping(entropy_coef=0.01).steer_entropy(0.5) == {}


def test_overlong_responses_neither_train_nor_count_in_whitening() -> None:
    it = shaping(overlong=OverlongConfig(mask=True), whiten_advantages=True)
    rows, _ = it.shape(phase(truncated=(True, False)), [[9.0, 9.0, 9.0], [4.0, 5.0]])
    assert rows.action_mask.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    assert rows["advantages"][0].tolist() == [0] * 4
    torch.testing.assert_close(rows["advantages"][1], torch.tensor([0, 1, -1, 0]) / math.sqrt(2))  # of 9 and 5


def test_a_phase_of_nothing_but_overlong_responses_is_finite() -> None:
    it = shaping(overlong=OverlongConfig(mask=True), whiten_advantages=True)
    rows, stats = it.shape(phase(truncated=(True, True)), [1.0, 2.0])
    assert not rows["advantages"].any()
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["rollout/cut"] == 1.0


def test_what_a_run_remembers_survives_a_checkpoint() -> None:
    settings: dict[str, Any] = {
        "kl_coef": 0.1,
        "adaptive_kl": AdaptiveKLConfig(1.0, 10.0),
        "scale_scores": "running",
    }
    first = shaping(**settings)
    shaped(first, [2.0, 1.0], gap=0.5)
    first.kl_control.update(5.0, 2)
    second = shaping(**settings)
    second.load_state_dict(first.state_dict())
    assert second.kl_control.value == first.kl_control.value != 0.1
    assert shaped(second, [9.0, 4.0], gap=0.2)[0].equal(shaped(first, [9.0, 4.0], gap=0.2)[0])
    assert second.first_std == first.first_std == pytest.approx(math.sqrt(0.5))


def test_a_fixed_coefficient_is_that_of_the_settings_whatever_was_saved() -> None:
    second = shaping(kl_coef=0.5)
    second.load_state_dict(shaping(kl_coef=0.1).state_dict())
    assert second.kl_control.value == 0.5
    second.load_state_dict(shaping(kl_coef=0.1, adaptive_kl=AdaptiveKLConfig(1.0)).state_dict())
    assert second.kl_control.value == 0.5


@pytest.mark.parametrize(
    ("changed", "goes_on"),
    [
        ({}, True),
        ({"adaptive_kl": AdaptiveKLConfig(1.0, 99.0)}, True),
        ({"kl_coef": 0.2}, False),
        ({"adaptive_kl": AdaptiveKLConfig(2.0, 10.0)}, False),
    ],
)
def test_a_steered_coefficient_goes_on_unless_it_is_steered_otherwise(changed: dict[str, Any], goes_on: bool) -> None:
    settings: dict[str, Any] = {"kl_coef": 0.1, "adaptive_kl": AdaptiveKLConfig(1.0, 10.0)}
    first, second = shaping(**settings), shaping(**{**settings, **changed})
    first.kl_control.update(5.0, 2)
    second.load_state_dict(first.state_dict())
    assert (second.kl_control.value == first.kl_control.value) is goes_on
    assert goes_on or second.kl_control.value == second.settings.kl_coef


def test_moments_of_other_scores_are_not_taken_over() -> None:
    first, second = shaping(scale_scores="running"), shaping(scale_scores="running")
    shaped(first, [200.0, 100.0])
    second.load_state_dict(first.state_dict(), other_scores=True)
    assert (second.moments.count, second.first_std) == (0, None)


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    returns = torch.tensor([[0.0, 2.0, JUNK]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.ones(1, 3), returns, mask) == 0.0
    assert explained_variance(torch.tensor([[0.0, 1.0, 0.0]]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(returns, torch.ones(1, 3), mask) == 0.0
    assert explained_variance(returns, returns, torch.zeros(1, 3)) == 0.0


def test_the_factor_of_whitening_by_hand() -> None:
    """Deviation 2 of three actions; what is masked out does not count."""
    advantages, mask = torch.tensor([[1.0, 3.0, 5.0, 100.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert whitening_factor(advantages, mask) == pytest.approx(0.5)
    assert whitening_factor(advantages, torch.tensor([[1.0, 0.0, 0.0, 0.0]])) == 0.0
