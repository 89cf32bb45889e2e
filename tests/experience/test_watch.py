"""What ends a run, and what is warned of once."""

from __future__ import annotations

import logging

import pytest
import torch

from megarl.errors import NumericsError
from megarl.experience.watch import Watch
from megarl.parallel.rows import Rows
from tests.refusals import refused


@pytest.mark.parametrize(
    ("stats", "groups", "warned"),
    [
        ({"rollout/score_std": 0.0}, 4, True),
        ({"rollout/score_std": 1.0}, 4, False),
        ({"rollout/score_std": 1.0, "rollout/zero_spread_groups": 4.0}, 4, True),
        ({"rollout/score_std": 1.0, "rollout/zero_spread_groups": 3.0}, 4, False),
    ],
)
def test_phases_with_equal_scores_log_one_warning(
    stats: dict[str, float], groups: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(None)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            watch.scores({"rollout/score": 1.0, **stats}, groups)
    assert len(caplog.records) == warned


def test_short_phases_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(None)
    with caplog.at_level(logging.WARNING):
        watch.short_phase(3, 8)
        watch.short_phase(2, 8)
    assert ["3 of 8" in record.message for record in caplog.records] == [True]


def test_a_kl_above_its_limit_ends_the_run_and_above_half_of_it_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(2.0)
    with caplog.at_level(logging.WARNING):
        for kl in (0.9, 1.1, 1.2):
            watch.kl(kl)
    assert len(caplog.records) == 1
    with refused(NumericsError, key="ppo.kl_limit", value=2.0):
        watch.kl(2.1)
    Watch(None).kl(1e9)


def test_a_column_with_nan_names_its_response() -> None:
    rows = Rows(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 3]), torch.ones(2, 3))
    rows = rows.with_columns(advantages=torch.tensor([[0.0, 1, 2], [0, float("nan"), 0]]))
    with refused(NumericsError, key="advantages", where="a.txt:2", names=("phase 3",)):
        Watch(None).finite(rows, ["advantages"], ["a.txt:1", "a.txt:2"], 3)
