"""Advantages of a phase: other projects' numbers come out of a run's own shaping, and groups are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.advantages import ADVANTAGES
from megarl.config.ppo import PPOSettings
from megarl.config.ppo_sections import OverlongConfig
from megarl.experience.advantages import COMPUTE, PhaseResults, group_counts
from megarl.experience.shaping import Greedy, Shaping
from megarl.parallel.rows import Rows
from megarl.rewards.answers import Score

KINDS = {
    "grpo_advantages": "grpo",
    "rloo_advantages": "rloo",
    "reinforce_pp_advantages": "reinforce_pp",
    "reinforce_pp_baseline_advantages": "reinforce_pp_baseline",
    "remax_advantages": "remax",
    "opo_advantages": "opo",
}
GOLDEN = json.loads((Path(__file__).parent.parent / "algorithms" / "golden.json").read_text())["cases"]
CASES = [case for case in GOLDEN if case["function"] in KINDS]
JUNK = 1e6


def shaped(
    kind: str, mask: Tensor, scores: list[Score], groups: list[int], **more: Any
) -> tuple[Rows, dict[str, float]]:
    """A phase without a critic and a KL, as `ppo.advantages=kind` shapes it."""
    greedy, truncated = more.pop("greedy", None), more.pop("truncated", [False] * len(mask))
    lengths = torch.full((len(mask),), mask.shape[1])
    rows = Rows(torch.zeros(mask.shape, dtype=torch.long), lengths, mask).with_columns(
        old_logprobs=torch.full(mask.shape, JUNK),
        group=torch.tensor(groups),
        truncated=torch.tensor(truncated),
    )
    cut, greedy_lengths = more.pop("greedy_truncated", [False] * len(mask)), more.pop("greedy_lengths", [1] * len(mask))
    compared = None if greedy is None else Greedy(greedy, cut, greedy_lengths)
    return Shaping(PPOSettings(advantages=kind, kl_coef=0.0, **more), 8).shape(rows, scores, compared)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_phase_has_the_advantages_that_other_projects_compute(case: dict[str, Any]) -> None:
    given, expected = case["args"], torch.tensor(case["expected"]["advantages"])
    kind = KINDS[case["function"]] if given.get("normalize", True) else "dr_grpo"
    if "mask" in given:
        mask = torch.tensor(given["mask"], dtype=torch.float32)
    else:
        lengths = torch.tensor(given.get("lengths", [3] * len(given["scores"])))
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    scores: list[Score] = given.get("scores") or [
        [reward for reward, kept in zip(rewards, row, strict=True) if kept]
        for rewards, row in zip(given["rewards"], given["mask"], strict=True)
    ]
    names = given.get("groups", range(len(mask)))
    groups = [list(dict.fromkeys(names)).index(name) for name in names]
    rows, _ = shaped(kind, mask, scores, groups, gamma=given.get("gamma", 1.0), greedy=given.get("baselines"))
    if expected.dim() == 1:
        expected = expected[:, None].expand_as(mask)
    torch.testing.assert_close(rows["advantages"] * mask, expected.float() * mask, rtol=1e-5, atol=1e-5)
    assert "returns" not in rows


def test_every_kind_of_advantages_is_computed_and_described() -> None:
    assert list(COMPUTE) == list(ADVANTAGES)


@pytest.mark.parametrize("kind", [kind for kind, needs in ADVANTAGES.items() if not needs.values])
def test_nothing_but_response_tokens_has_an_advantage_and_nothing_is_nan(kind: str) -> None:
    """Two rows that score alike, one alone in its group, and one with no token at all."""
    mask = torch.tensor([[0.0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    rewards = torch.where(mask == 0, JUNK, 0.5)
    results = PhaseResults(rewards, mask, torch.tensor([7, 7, 3, 5]), greedy=torch.tensor([0.5, 0.5, 1.0, 0.0]))
    advantages = COMPUTE[kind](results)
    assert torch.isfinite(advantages).all()
    assert not advantages[mask == 0].any()


def test_advantages_of_groups_are_of_whole_responses_with_the_penalty_and_the_kl_in_them() -> None:
    """What PPO adds to rewards counts for a group too: 4 and 0 lose 1 each where they were cut, so 3 and 0 remain."""
    mask = torch.tensor([[0.0, 1, 1], [0, 1, 0]])
    rows = Rows(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 2]), mask).with_columns(
        old_logprobs=mask * -1.0,
        ref_logprobs=mask * -1.5,
        group=torch.tensor([0, 0]),
        truncated=torch.tensor([True, False]),
    )
    settings = PPOSettings(advantages="dr_grpo", kl_coef=1.0, overlong=OverlongConfig(missing_eos_penalty=1.0))
    found, stats = Shaping(settings, 8).shape(rows, [4.0, 0.0])
    # the KL of half a nat a token: 4 - 1 - 2 * .5 = 2, and 0 - .5
    torch.testing.assert_close(found["advantages"], mask * torch.tensor([[1.25], [-1.25]]))
    assert stats["rollout/kl"] == pytest.approx(0.75)


def test_advantages_are_whitened_where_it_is_asked_for_or_belongs_to_their_kind() -> None:
    mask, scores = torch.ones(4, 2), [1.0, 2.0, 3.0, 5.0]
    plain, stats = shaped("rloo", mask, scores, [0, 0, 1, 1])
    assert "rollout/whitening_factor" not in stats
    assert plain["advantages"][:, 0].tolist() == [-1, 1, -2, 2]
    white, stats = shaped("rloo", mask, scores, [0, 0, 1, 1], whiten_advantages=True)
    assert stats["rollout/whitening_factor"] > 0
    assert float(white["advantages"].var()) == pytest.approx(1.0)
    raw, _ = shaped("reinforce_pp", mask, scores, [0, 0, 1, 1], whiten_advantages=False)
    assert raw["advantages"][:, 0].tolist() == scores


def test_groups_that_say_nothing_and_those_of_one_are_counted() -> None:
    groups = torch.tensor([4, 4, 9, 9, 9, 2, 0])
    counts = group_counts(torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 3.0, 3.0]), groups)
    assert counts == {"rollout/zero_spread_groups": 1.0, "rollout/groups_of_one": 2.0}
    _, stats = shaped("grpo", torch.ones(4, 2), [1.0, 1.0, 2.0, 3.0], [0, 0, 1, 2])
    assert (stats["rollout/zero_spread_groups"], stats["rollout/groups_of_one"]) == (1.0, 2.0)
    _, stats = shaped("grpo", torch.ones(2, 2), [5.0, 7.0], [0, 0], clip_scores=1.0)
    assert stats["rollout/zero_spread_groups"] == 1.0
    cut = OverlongConfig(missing_eos_penalty=1.0)
    _, stats = shaped("grpo", torch.ones(2, 2), [2.0, 2.0], [0, 0], truncated=[True, False], overlong=cut)
    assert stats["rollout/zero_spread_groups"] == 0.0


def test_a_greedy_score_is_clipped_and_scaled_as_the_others_are() -> None:
    mask = torch.ones(2, 2)
    rows, stats = shaped("remax", mask, [9.0, 1.0], [0, 1], greedy=[[2.0, 7.0], 0.5], clip_scores=3.0)
    assert rows["advantages"][:, 0].tolist() == [3.0 - 5.0, 0.5]
    assert stats["rollout/greedy_score"] == 4.75


def test_a_greedy_response_that_was_cut_is_penalised_as_a_sampled_one_is() -> None:
    cut = {
        "truncated": [True, True],
        "greedy_truncated": [True, False],
        "overlong": OverlongConfig(missing_eos_penalty=3.0),
    }
    rows, _ = shaped("remax", torch.ones(2, 2), [1.0, 1.0], [0, 1], greedy=[1.0, 1.0], **cut)
    assert rows["advantages"][:, 0].tolist() == [0.0, -3.0]


def test_a_greedy_response_pays_the_same_for_its_length() -> None:
    """Of 8 tokens, the last 4 are the buffer. The second greedy response is as long as the sampled ones."""
    mask = (torch.arange(6) < torch.tensor([[6], [6]])).float()
    long = {"overlong": OverlongConfig(penalty=4.0, buffer=0.5), "greedy_lengths": [2, 6]}
    rows, _ = shaped("remax", mask, [1.0, 1.0], [0, 1], greedy=[1.0, 1.0], **long)
    assert rows["advantages"][:, 0].tolist() == [-2.0, 0.0]


def test_responses_that_do_not_train_for_their_length_count_in_their_group_with_their_score() -> None:
    """Three that score -1 and one that was cut at -5: its score is in the mean of -2, and it does not train."""
    mask, scores = torch.ones(4, 2), [-1.0, -1.0, -1.0, -5.0]
    rows, _ = shaped(
        "dr_grpo", mask, scores, [0] * 4, truncated=[False, False, False, True], overlong=OverlongConfig(mask=True)
    )
    assert rows["advantages"].tolist() == [[1.0, 1.0]] * 3 + [[0.0, 0.0]]
    assert rows.action_mask.sum(dim=1).tolist() == [2, 2, 2, 0]
